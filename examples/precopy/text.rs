//! Numbers in a readable form.

/// `1234567` as `1,234,567`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `n` and the noun, with an `s` unless there is one: `1 page`, `2,000 pages`.
pub(crate) fn plural(number: u64, noun: &str) -> String {
    let ending = if number == 1 { "" } else { "s" };
    format!("{} {noun}{ending}", count(number))
}

/// A number of bytes in the largest unit that leaves at least 1: `81 B`, `4 KiB`, `776.9 MiB`.
pub(crate) fn bytes(number: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = (number.max(1).ilog2() / 10) as usize;
    let shift = 10 * unit as u32;
    if number.trailing_zeros() >= shift {
        return format!("{} {}", number >> shift, UNITS[unit]);
    }
    format!(
        "{:.1} {}",
        number as f64 / (1u64 << shift) as f64,
        UNITS[unit]
    )
}

/// A time in microseconds in a unit that fits: `81 us`, `12.3 ms`, `4.56 s`.
pub(crate) fn micros(number: u64) -> String {
    match number {
        0..1_000 => format!("{number} us"),
        1_000..1_000_000 => format!("{:.1} ms", number as f64 / 1e3),
        _ => format!("{:.2} s", number as f64 / 1e6),
    }
}

/// A number for an axis: `0`, `950`, `1k`, `2.5k`, `100k`, `3M`.
pub(crate) fn short(number: f64) -> String {
    let (scaled, unit) = match number.abs() {
        size if size >= 1e9 => (number / 1e9, "G"),
        size if size >= 1e6 => (number / 1e6, "M"),
        size if size >= 1e3 => (number / 1e3, "k"),
        _ => (number, ""),
    };
    // Rounded to one digit after the point, which `Display` omits if it is zero.
    format!("{}{unit}", (scaled * 10.0).round() / 10.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_three() {
        let texts = [0, 7, 999, 1000, 98_787, 1_283_301_825, u64::MAX].map(count);
        let expected = [
            "0",
            "7",
            "999",
            "1,000",
            "98,787",
            "1,283,301,825",
            "18,446,744,073,709,551,615",
        ];
        assert_eq!(texts, expected);
        assert_eq!(plural(1, "page"), "1 page");
        assert_eq!(plural(2000, "page"), "2,000 pages");
    }

    #[test]
    fn units_fit_the_number() {
        let texts = [0, 1, 1023, 1024, 4096, 1536, 814_637_137, 1 << 63, u64::MAX].map(bytes);
        let expected = [
            "0 B",
            "1 B",
            "1023 B",
            "1 KiB",
            "4 KiB",
            "1.5 KiB",
            "776.9 MiB",
            "8 EiB",
            "16.0 EiB",
        ];
        assert_eq!(texts, expected);
        assert_eq!(
            [81, 12_345, 4_560_000].map(micros),
            ["81 us", "12.3 ms", "4.56 s"]
        );
        let axis = [0.0, 950.0, 1000.0, 2500.0, 100_000.0, 3e6].map(short);
        assert_eq!(axis, ["0", "950", "1k", "2.5k", "100k", "3M"]);
    }
}
