//! Explores the models of the protocols, whole and with each weakness, and prints the results.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut failed = 0;
    for case in proptests::protocol::cases() {
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
