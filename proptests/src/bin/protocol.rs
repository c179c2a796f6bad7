//! Explores the models of the protocols, whole and with each weakness, and prints the results. With
//! names as arguments, only those models.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut failed = 0;
    let names: Vec<String> = std::env::args().skip(1).collect();
    let asked = |model: &str| names.is_empty() || names.iter().any(|name| name == model);
    let cases = proptests::protocol::cases();
    for case in cases.into_iter().filter(|case| asked(case.model)) {
        let outcome = case.run();
        let verdict = match &outcome.loss {
            None => "holds",
            Some(_) => "loses a write",
        };
        let weakness = case.weakness.unwrap_or("as it is");
        println!(
            "{:10}{weakness:66}{:>8} states  {verdict}",
            case.model, outcome.states
        );
        if let Some(loss) = &outcome.loss {
            loss.steps
                .iter()
                .for_each(|step| println!("            {step}"));
        }
        if !case.is_as_expected(&outcome) {
            failed += 1;
            println!("        NOT AS EXPECTED {outcome:?}");
        }
    }
    println!("{failed} not as expected");
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
