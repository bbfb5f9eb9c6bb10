//! Which columns a series has, what they mean and how they are transformed.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The function applied to a column before it is standardised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scale {
    /// Natural logarithm. The column must be positive.
    Log,
    /// `ln(1 + x)`. The column must be zero or more.
    Log1p,
    /// The value itself.
    Identity,
}

impl Scale {
    /// Applies the function.
    #[inline]
    pub fn forward(self, x: f64) -> f64 {
        match self {
            Scale::Log => x.ln(),
            Scale::Log1p => x.ln_1p(),
            Scale::Identity => x,
        }
    }

    /// Undoes [`forward`](Self::forward).
    #[inline]
    pub fn inverse(self, y: f64) -> f64 {
        match self {
            Scale::Log => y.exp(),
            Scale::Log1p => y.exp_m1(),
            Scale::Identity => y,
        }
    }

    /// Whether a finite value lies in the domain.
    #[inline]
    pub(crate) fn accepts(self, x: f64) -> bool {
        match self {
            Scale::Log => x > 0.0,
            Scale::Log1p => x >= 0.0,
            Scale::Identity => true,
        }
    }

    /// What [`accepts`](Self::accepts) asks for, in words.
    pub(crate) fn expected(self) -> &'static str {
        match self {
            Scale::Log => "expected a number above zero, since its logarithm is taken",
            Scale::Log1p => "expected zero or more, since ln(1 + x) is taken",
            Scale::Identity => "expected a number",
        }
    }
}

/// What a column means. Indicators find the columns they are computed from by role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// First price of the step.
    Open,
    /// Highest price of the step.
    High,
    /// Lowest price of the step.
    Low,
    /// Last price of the step.
    Close,
    /// Amount traded in the step.
    Volume,
    /// Anything else.
    #[default]
    Other,
}

/// One column of a series.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ColumnSpec {
    /// Its name in the file (compared without regard to case) and in the shards.
    pub name: String,
    /// What it means.
    #[serde(default)]
    pub role: Role,
    /// The function applied before standardising.
    pub scale: Scale,
    /// Other names under which files carry it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
}

impl ColumnSpec {
    /// A column with [`Role::Other`] and no aliases.
    pub fn new(name: impl Into<String>, scale: Scale) -> Self {
        Self {
            name: name.into(),
            role: Role::Other,
            scale,
            aliases: Vec::new(),
        }
    }

    /// Sets the role.
    pub fn with_role(mut self, role: Role) -> Self {
        self.role = role;
        self
    }

    /// Adds another name under which files carry the column.
    pub fn with_alias(mut self, alias: impl Into<String>) -> Self {
        self.aliases.push(alias.into());
        self
    }

    /// Whether a header cell names this column.
    pub(crate) fn is_named(&self, cell: &str) -> bool {
        std::iter::once(&self.name)
            .chain(&self.aliases)
            .any(|name| name.eq_ignore_ascii_case(cell))
    }
}

/// The columns of a series and the step of its clock.
///
/// The default is [`Schema::ohlcv`]. Any other set of columns works in the same way:
///
/// ```
/// use mamba_ssm_data::{ColumnSpec, Scale, Schema};
///
/// let schema = Schema {
///     time: ColumnSpec::new("when", Scale::Identity),
///     columns: vec![
///         ColumnSpec::new("power_kw", Scale::Log1p),
///         ColumnSpec::new("temperature", Scale::Identity),
///     ],
///     step: 900,
/// };
/// assert!(schema.validate().is_ok());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schema {
    /// The column that holds the time. Its unit (seconds, milliseconds, microseconds or
    /// nanoseconds since 1970) is seen from its magnitude; its scale is not used.
    pub time: ColumnSpec,
    /// The columns, in the order in which they become features.
    pub columns: Vec<ColumnSpec>,
    /// Seconds from one row to the next; a greater step is a gap.
    pub step: i64,
}

impl Schema {
    /// `Timestamp, Open, High, Low, Close, Volume`, one row a minute: log of the prices, log1p of
    /// the volume. Knows the names of the Kaggle Bitcoin set (old and new) and of Binance.
    pub fn ohlcv() -> Self {
        let price = |name: &str, role| ColumnSpec::new(name, Scale::Log).with_role(role);
        Self {
            time: ColumnSpec::new("Timestamp", Scale::Identity)
                .with_alias("open_time")
                .with_alias("unix")
                .with_alias("time"),
            columns: vec![
                price("Open", Role::Open),
                price("High", Role::High),
                price("Low", Role::Low),
                price("Close", Role::Close),
                ColumnSpec::new("Volume", Scale::Log1p)
                    .with_role(Role::Volume)
                    .with_alias("Volume_(BTC)")
                    .with_alias("Volume BTC"),
            ],
            step: 60,
        }
    }

    /// Names of the columns, in order.
    pub fn names(&self) -> Vec<String> {
        self.columns.iter().map(|c| c.name.clone()).collect()
    }

    /// Index of the first column with this role.
    pub fn index_of_role(&self, role: Role) -> Option<usize> {
        self.columns.iter().position(|c| c.role == role)
    }

    /// Index of the column with this name (without regard to case).
    pub fn index_of(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|c| c.is_named(name))
    }

    /// Checks that there are columns, that their names differ, and that the step is positive.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] naming what is wrong.
    pub fn validate(&self) -> Result<()> {
        let wrong = |reason: String| {
            Err(Error::InvalidOption {
                option: "schema",
                reason,
            })
        };
        if self.columns.is_empty() {
            return wrong("there are no columns; expected at least one".into());
        }
        if self.step <= 0 {
            return wrong(format!(
                "step is {}; expected seconds above zero",
                self.step
            ));
        }
        for (i, column) in self.columns.iter().enumerate() {
            let reserved = ["timestamp", "valid"];
            if column.name.trim().is_empty() || reserved.iter().any(|r| column.is_named(r)) {
                return wrong(format!(
                    "`{}` cannot name a column (the names `timestamp` and `valid` are the shards' own)",
                    column.name
                ));
            }
            if self.columns[..i].iter().any(|c| c.is_named(&column.name)) {
                return wrong(format!("two columns are named `{}`", column.name));
            }
        }
        Ok(())
    }
}

impl Default for Schema {
    fn default() -> Self {
        Self::ohlcv()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_invert() {
        for scale in [Scale::Log, Scale::Log1p, Scale::Identity] {
            for x in [1e-6, 0.5, 1.0, 64_000.0] {
                let back = scale.inverse(scale.forward(x));
                assert!(
                    (back - x).abs() <= 1e-12 * x.max(1.0),
                    "{scale:?} {x} {back}"
                );
            }
        }
    }

    #[test]
    fn bad_schemas_are_refused() {
        let mut schema = Schema::ohlcv();
        schema.step = 0;
        assert!(schema.validate().unwrap_err().to_string().contains("step"));

        let mut schema = Schema::ohlcv();
        schema.columns[1].name = "open".into();
        assert!(
            schema
                .validate()
                .unwrap_err()
                .to_string()
                .contains("`open`")
        );

        let mut schema = Schema::ohlcv();
        schema.columns[1].name = "Valid".into();
        assert!(schema.validate().is_err());

        let mut schema = Schema::ohlcv();
        schema.columns.clear();
        assert!(schema.validate().is_err());
    }

    #[test]
    fn unknown_keys_in_a_schema_file_are_refused() {
        let text = r#"{"time":{"name":"t","scale":"identity"},"columns":[],"step":60,"stepp":1}"#;
        let message = serde_json::from_str::<Schema>(text)
            .unwrap_err()
            .to_string();
        assert!(message.contains("stepp"), "{message}");
    }
}
