//! Points in time: unix seconds, written and read.

use chrono::{DateTime, NaiveDate, NaiveDateTime};

use crate::{Error, Result};

/// Reads a point in time: `2024-01-31`, `2024-01-31T12:00`, `2024-01-31 12:00:00` (all UTC), an
/// RFC 3339 time with a zone, or unix seconds. Returns unix seconds, any fraction cut off.
///
/// # Errors
///
/// [`Error::InvalidOption`] when the text is none of these.
///
/// ```
/// use mamba_ssm_data::parse_time;
/// assert_eq!(parse_time("1970-01-02")?, 86_400);
/// assert_eq!(parse_time("1970-01-01T01:00:00+01:00")?, 0);
/// assert!(parse_time("yesterday").is_err());
/// # Ok::<(), mamba_ssm_data::Error>(())
/// ```
pub fn parse_time(text: &str) -> Result<i64> {
    let text = text.trim();
    if let Ok(seconds) = text.parse::<i64>() {
        return Ok(seconds);
    }
    if let Ok(date) = NaiveDate::parse_from_str(text, "%Y-%m-%d") {
        return Ok(date.and_time(chrono::NaiveTime::MIN).and_utc().timestamp());
    }
    for format in [
        "%Y-%m-%dT%H:%M:%S%.f",
        "%Y-%m-%d %H:%M:%S%.f",
        "%Y-%m-%dT%H:%M",
        "%Y-%m-%d %H:%M",
    ] {
        if let Ok(time) = NaiveDateTime::parse_from_str(text, format) {
            return Ok(time.and_utc().timestamp());
        }
    }
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Ok(time.timestamp());
    }
    Err(Error::InvalidOption {
        option: "time",
        reason: format!(
            "`{}` is not a time; expected for example 2024-01-31, 2024-01-31T12:00 or unix seconds",
            crate::error::shorten(text)
        ),
    })
}

/// Unix seconds as `2024-01-31T12:00:00Z`; the bare number where no calendar reaches.
pub fn format_time(seconds: i64) -> String {
    match DateTime::from_timestamp(seconds, 0) {
        Some(time) => time.format("%Y-%m-%dT%H:%M:%SZ").to_string(),
        None => seconds.to_string(),
    }
}

/// Whether the calendar reaches this second: what lies far outside overflows where times are subtracted or
/// counted in milliseconds.
pub(crate) fn is_in_calendar(seconds: i64) -> bool {
    DateTime::from_timestamp(seconds, 0).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_in_every_spelling() {
        for text in [
            "2024-02-29",
            "2024-02-29T00:00",
            "2024-02-29 00:00:00",
            "2024-02-29 00:00:00.750",
            "1709164800",
            "2024-02-29T01:00:00+01:00",
        ] {
            assert_eq!(parse_time(text).unwrap(), 1_709_164_800, "{text}");
        }
        assert_eq!(format_time(1_709_164_800), "2024-02-29T00:00:00Z");
    }

    #[test]
    fn a_day_that_does_not_exist_is_refused() {
        let message = parse_time("2023-02-29").unwrap_err().to_string();
        assert!(message.contains("2023-02-29"), "{message}");
    }
}
