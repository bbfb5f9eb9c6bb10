//! Numbers and times as readers want them.

use chrono::DateTime;

/// `2024-06-30 23:59 UTC`; the bare number when it is outside the calendar's range.
pub(crate) fn utc(timestamp: i64) -> String {
    format_utc(timestamp, "%Y-%m-%d %H:%M UTC")
}

/// A time in a format of [`chrono::format::strftime`].
pub(crate) fn format_utc(timestamp: i64, format: &str) -> String {
    match DateTime::from_timestamp(timestamp, 0) {
        Some(time) => time.format(format).to_string(),
        None => timestamp.to_string(),
    }
}

/// Four significant digits, plain between 0.001 and ten million, else with an exponent.
pub(crate) fn number(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 {
        "0".to_owned()
    } else if (1e-3..1e7).contains(&size) {
        let digits = (3 - size.log10().floor() as i32).max(0) as usize;
        grouped(&format!("{value:.digits$}"))
    } else {
        format!("{value:.3e}")
    }
}

/// R2 with the digits that tell 0.9999 from 0.999999.
pub(crate) fn r2(value: f64) -> String {
    if value.abs() < 1e4 {
        format!("{value:.6}")
    } else {
        format!("{value:.3e}")
    }
}

/// A skill with its sign; `n/a` when the naive forecaster is perfect.
pub(crate) fn skill(value: Option<f64>) -> String {
    match value {
        None => "n/a".to_owned(),
        Some(value) if value.abs() < 10.0 => format!("{value:+.4}"),
        Some(value) if value.abs() < 1e5 => format!("{value:+.1}"),
        Some(value) => format!("{value:+.3e}"),
    }
}

/// Thousands apart, for counts.
pub(crate) fn count(value: u64) -> String {
    grouped(&value.to_string())
}

/// Puts commas between the thousands of a decimal number.
pub(crate) fn grouped(number: &str) -> String {
    let (sign, digits) = match number.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", number),
    };
    let (whole, rest) = digits.split_at(digits.find('.').unwrap_or(digits.len()));
    let mut out = sign.to_owned();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(utc(1_719_791_940), "2024-06-30 23:59 UTC");
        assert_eq!(utc(i64::MAX), i64::MAX.to_string());
    }

    #[test]
    fn numbers() {
        assert_eq!(number(0.0), "0");
        assert_eq!(number(0.549_12), "0.5491");
        assert_eq!(number(61_234.56), "61,235");
        assert_eq!(number(-12.345), "-12.35");
        assert_eq!(number(0.000_866), "8.660e-4");
        assert_eq!(number(3.2e9), "3.200e9");
        assert_eq!(grouped("-1234567.25"), "-1,234,567.25");
        assert_eq!(count(999), "999");
        assert_eq!(skill(None), "n/a");
        assert_eq!(skill(Some(0.2134)), "+0.2134");
        assert_eq!(skill(Some(-1244.0)), "-1244.0");
        assert_eq!(skill(Some(-1.5e6)), "-1.500e6");
        assert_eq!(r2(0.999_999), "0.999999");
    }
}
