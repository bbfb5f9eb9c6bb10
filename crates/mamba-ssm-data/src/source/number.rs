//! Numbers from bytes, fast in the common case and never wrong in the rest.

/// Powers of ten that a double holds exactly.
const EXACT_POWERS: [f64; 23] = [
    1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16,
    1e17, 1e18, 1e19, 1e20, 1e21, 1e22,
];

/// Whether a byte ends a cell.
#[inline]
pub(super) fn ends_cell(byte: u8, delimiter: u8) -> bool {
    byte == delimiter || byte == b'\n' || byte == b'\r'
}

/// Reads plain decimal digits (`-12.5`) from the start of `bytes` up to the end of the cell.
///
/// Returns the number and the bytes read, or `None` for anything that needs [`parse`]: exponents,
/// words, blanks, more than 19 digits. The result is exact to the last bit: the digits fit 53 bits and
/// the power of ten is one that a double holds, so the single division rounds once (Clinger, "How
/// to read floating point numbers accurately", 1990).
#[inline]
pub(super) fn fast_decimal(bytes: &[u8], delimiter: u8) -> Option<(f64, usize)> {
    let negative = bytes.first() == Some(&b'-');
    let start = usize::from(negative);
    let mut at = start;
    let mut digits = 0u64;
    let whole = read_digits(bytes, &mut at, &mut digits);
    let mut decimals = 0;
    if bytes.get(at) == Some(&b'.') {
        at += 1;
        decimals = read_digits(bytes, &mut at, &mut digits);
    }
    let ended = bytes.get(at).is_none_or(|&b| ends_cell(b, delimiter));
    let count = whole + decimals;
    if !ended || count == 0 || count > 19 || digits > 1 << 53 || decimals > 22 {
        return None;
    }
    let value = digits as f64 / EXACT_POWERS[decimals];
    Some((if negative { -value } else { value }, at))
}

/// Adds digits to `value`; returns how many there were. May wrap: the caller counts digits.
#[inline]
fn read_digits(bytes: &[u8], at: &mut usize, value: &mut u64) -> usize {
    let start = *at;
    while let Some(digit) = bytes.get(*at).map(|b| b.wrapping_sub(b'0'))
        && digit < 10
    {
        *value = value.wrapping_mul(10).wrapping_add(u64::from(digit));
        *at += 1;
    }
    *at - start
}

/// Reads any spelling of a number; NaN for a missing value; `None` for a word.
pub(super) fn parse(cell: &[u8]) -> Option<f64> {
    let text = std::str::from_utf8(cell).ok()?.trim();
    const MISSING: [&str; 6] = ["", "na", "n/a", "null", "none", "nan"];
    if MISSING.iter().any(|m| m.eq_ignore_ascii_case(text)) {
        return Some(f64::NAN);
    }
    text.parse().ok()
}

/// Reads a point in time as unix seconds: a unix time in seconds, milliseconds, microseconds or
/// nanoseconds (told apart by magnitude, good from 1973 to 5138), or a date.
pub(super) fn parse_seconds(cell: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(cell).ok()?.trim();
    if let Ok(ticks) = text.parse::<i64>() {
        return Some(to_seconds(ticks));
    }
    if let Ok(value) = text.parse::<f64>() {
        return (value.is_finite() && value.abs() < 9e18).then(|| to_seconds(value.floor() as i64));
    }
    crate::time::parse_time(text).ok()
}

/// Whole seconds of a unix time in any of the four units.
pub(super) fn to_seconds(ticks: i64) -> i64 {
    let per_second = match ticks.unsigned_abs() {
        0..100_000_000_000 => 1,
        100_000_000_000..100_000_000_000_000 => 1_000,
        100_000_000_000_000..100_000_000_000_000_000 => 1_000_000,
        _ => 1_000_000_000,
    };
    ticks.div_euclid(per_second)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_four_units_give_the_same_second() {
        for text in [
            "1735689600",
            "1735689600.0",
            "1735689600000",
            "1735689600000000",
            "1735689600000000000",
            "2025-01-01",
        ] {
            assert_eq!(
                parse_seconds(text.as_bytes()),
                Some(1_735_689_600),
                "{text}"
            );
        }
        assert_eq!(parse_seconds(b"soon"), None);
        assert_eq!(parse_seconds(b"nan"), None);
        assert_eq!(parse_seconds(b"1e300"), None);
    }

    #[test]
    fn missing_values_are_nan_and_words_are_refused() {
        for text in ["", " ", "NaN", "null", "N/A"] {
            assert!(parse(text.as_bytes()).unwrap().is_nan(), "{text}");
        }
        assert_eq!(parse(b"1e3"), Some(1000.0));
        assert_eq!(parse(b"12x"), None);
        assert_eq!(parse(b"\xff"), None);
    }

    proptest! {
        #[test]
        fn the_fast_way_agrees_with_the_standard_library(text in "-?[0-9]{0,20}\\.?[0-9]{0,24}", tail in "[,\r\n]?[0-9]{0,3}") {
            let line = format!("{text}{tail}");
            if let Some((value, read)) = fast_decimal(line.as_bytes(), b',') {
                let expected: f64 = line[..read].parse().unwrap();
                prop_assert_eq!(value.to_bits(), expected.to_bits());
            }
        }

        #[test]
        fn no_bytes_make_the_readers_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = (fast_decimal(&bytes, b','), parse(&bytes), parse_seconds(&bytes));
        }
    }
}
