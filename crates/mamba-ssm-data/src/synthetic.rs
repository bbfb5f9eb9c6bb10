//! A generated market of one-minute candles: made up, never real.
//!
//! It has what makes minute data hard and what makes parts of it forecastable: volatility that
//! clusters (a daily and a twenty-minute component, the latter fed by the size of the last move),
//! heavy tails, a daily and weekly clock, volume that follows volatility, the clock, the size of
//! the minute's move and its own past, and outages. Returns are a martingale difference, so
//! nobody can forecast the close; ranges and volumes can be forecast.
//!
//! A seed gives the same bytes on every platform: the random numbers are ChaCha8's, and
//! logarithms and exponentials are computed in portable Rust rather than by the system.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use rand::rngs::ChaCha8Rng;
use rand::{Rng, SeedableRng};

/// Smallest price step, in dollars.
const TICK: f64 = 0.01;
/// Price moves simulated within a minute.
const STEPS: usize = 20;
const MINUTES_PER_YEAR: f64 = 365.25 * 24.0 * 60.0;

/// One minute of trading.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candle {
    /// Start of the minute, unix seconds.
    pub timestamp: i64,
    /// First price, dollars.
    pub open: f64,
    /// Highest price, dollars.
    pub high: f64,
    /// Lowest price, dollars.
    pub low: f64,
    /// Last price, dollars.
    pub close: f64,
    /// Coins traded.
    pub volume: f64,
}

/// What to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct MarketConfig {
    /// Seed of the random numbers. Default 1.
    pub seed: u64,
    /// Minutes of clock time covered. There are fewer candles where there are [`gaps`](Self::gaps).
    pub minutes: usize,
    /// Time of the first candle, unix seconds; rounded down to a minute. Default 2024-01-01 00:00 UTC.
    pub start: i64,
    /// Price at the start, dollars. Default 42,000.
    pub start_price: f64,
    /// Typical volatility of a year's log return. Default 0.6.
    pub annual_volatility: f64,
    /// Typical volume of a minute, coins. Default 12.
    pub typical_volume: f64,
    /// Whether minutes go missing: single ones, about one in a thousand, and outages of five
    /// minutes to six hours, about one in four days. The market moves on meanwhile, so the same
    /// seed without gaps gives the same candles and the missing ones. Default true.
    pub gaps: bool,
}

impl MarketConfig {
    /// `minutes` of clock time with the defaults.
    pub fn new(minutes: usize) -> Self {
        Self {
            seed: 1,
            minutes,
            start: 1_704_067_200,
            start_price: 42_000.0,
            annual_volatility: 0.6,
            typical_volume: 12.0,
            gaps: true,
        }
    }

    /// Another seed.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Another time of the first candle, unix seconds.
    pub fn with_start(mut self, start: i64) -> Self {
        self.start = start;
        self
    }

    /// Another price at the start, dollars.
    pub fn with_start_price(mut self, start_price: f64) -> Self {
        self.start_price = start_price;
        self
    }

    /// Another volatility of a year's log return.
    pub fn with_annual_volatility(mut self, annual_volatility: f64) -> Self {
        self.annual_volatility = annual_volatility;
        self
    }

    /// Another typical volume of a minute, coins.
    pub fn with_typical_volume(mut self, typical_volume: f64) -> Self {
        self.typical_volume = typical_volume;
        self
    }

    /// With or without missing minutes.
    pub fn with_gaps(mut self, gaps: bool) -> Self {
        self.gaps = gaps;
        self
    }
}

/// Generates the candles of a made-up market, oldest first.
///
/// Between neighbouring minutes the open is the last close within a few thousandths of a percent;
/// prices are whole cents above zero; the high is the highest and the low the lowest of the four.
///
/// ```
/// use mamba_ssm_data::synthetic::{MarketConfig, generate};
///
/// let candles = generate(&MarketConfig::new(1_000).with_seed(7).with_gaps(false));
/// assert_eq!(candles.len(), 1_000);
/// assert!(candles.iter().all(|c| c.low <= c.open && c.open <= c.high && c.volume > 0.0));
/// ```
///
/// # Panics
///
/// When the price, the volatility or the volume of the config is not a finite number above zero.
pub fn generate(config: &MarketConfig) -> Vec<Candle> {
    for (what, value) in [
        ("start_price", config.start_price),
        ("annual_volatility", config.annual_volatility),
        ("typical_volume", config.typical_volume),
    ] {
        assert!(
            value.is_finite() && value > 0.0,
            "the market's {what} is {value}; expected a finite number above zero"
        );
    }
    let mut market = Market::new(config);
    let mut outages = Outages::new(config.seed);
    let start = config.start - config.start.rem_euclid(60);
    let mut candles = Vec::with_capacity(config.minutes);
    for minute in 0..config.minutes {
        let candle = market.minute(start + 60 * minute as i64);
        let missing = outages.next_is_missing();
        if !(config.gaps && missing) {
            candles.push(candle);
        }
    }
    candles
}

/// Writes candles as CSV in the layout of the Kaggle set `mczielinski/bitcoin-historical-data`:
/// a header, then `Timestamp,Open,High,Low,Close,Volume` with the time as a decimal number.
///
/// The file is written beside `path` and renamed, so `path` never holds half a market.
///
/// # Errors
///
/// When the folder of `path` does not exist or cannot be written to.
pub fn write_csv(path: &Path, candles: &[Candle]) -> io::Result<()> {
    let beside = beside(path);
    let written = write_rows(&beside, candles).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        // Best effort: the error that matters is the first one.
        let _ = fs::remove_file(&beside);
    }
    written
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    path.with_file_name(name)
}

fn write_rows(path: &Path, candles: &[Candle]) -> io::Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    writeln!(out, "Timestamp,Open,High,Low,Close,Volume")?;
    for c in candles {
        writeln!(
            out,
            "{}.0,{:.2},{:.2},{:.2},{:.2},{:.8}",
            c.timestamp, c.open, c.high, c.low, c.close, c.volume
        )?;
    }
    out.into_inner()?.sync_all()
}

/// The hidden state of the market between minutes.
struct Market {
    random: Normals,
    price: f64,
    /// Logarithm of the typical volatility of a minute.
    base: f64,
    log_volume: f64,
    /// Slow and fast departures of the log volatility from its base.
    slow: f64,
    fast: f64,
    /// Departure of the log volume that volatility does not explain.
    appetite: f64,
}

impl Market {
    fn new(config: &MarketConfig) -> Self {
        Self {
            random: Normals::new(config.seed, 0),
            price: ticks(config.start_price),
            base: libm::log(config.annual_volatility / libm::sqrt(MINUTES_PER_YEAR)),
            log_volume: libm::log(config.typical_volume),
            slow: 0.0,
            fast: 0.0,
            appetite: 0.0,
        }
    }

    fn minute(&mut self, timestamp: i64) -> Candle {
        let clock = clock(timestamp);
        let departure = self.slow + self.fast + clock;
        // Clustering and the clock raise the mean of squares; 0.35 takes that out again.
        let volatility = libm::exp(self.base + departure - 0.35) * self.tail();
        let open = self.first_price();
        let (high, low, close) = self.path(open, volatility);
        let surprise = libm::fabs(libm::log(close / open)) / volatility;
        let volume = self.volume(departure, volatility, libm::log(high / low), timestamp);
        self.price = close;
        self.advance(surprise);
        Candle {
            timestamp,
            open,
            high,
            low,
            close,
            volume,
        }
    }

    /// Root of an inverse chi-square of mean one: makes a minute's moves Student's t, 6 degrees.
    fn tail(&mut self) -> f64 {
        const FREEDOM: usize = 6;
        let squares: f64 = (0..FREEDOM)
            .map(|_| self.random.next())
            .map(|z| z * z)
            .sum();
        libm::sqrt((FREEDOM - 2) as f64 / squares.max(0.05))
    }

    /// The last close, or a price some thousandths of a percent away: the first trade of half
    /// the minutes is on the other side of the spread.
    fn first_price(&mut self) -> f64 {
        let moved = self.random.uniform() < 0.5;
        let move_by = if moved {
            1e-5 * self.random.next().clamp(-4.0, 4.0)
        } else {
            0.0
        };
        ticks(self.price * (1.0 + move_by))
    }

    /// High, low and close of a random walk from `open`.
    fn path(&mut self, open: f64, volatility: f64) -> (f64, f64, f64) {
        let step = volatility / libm::sqrt(STEPS as f64);
        let (mut high, mut low, mut walk) = (open, open, 0.0);
        let mut price = open;
        for _ in 0..STEPS {
            walk += step * self.random.next();
            // Minus half the variance: the price, not its logarithm, has no drift.
            price = ticks(open * libm::exp(walk - 0.5 * step * step));
            high = high.max(price);
            low = low.min(price);
        }
        (high, low, price)
    }

    fn volume(&mut self, departure: f64, volatility: f64, range: f64, timestamp: i64) -> f64 {
        // The walk's range is about 1.6 volatilities; the floor keeps a still minute finite.
        let liveliness = libm::log(range / (1.6 * volatility) + 0.1);
        let on_the_hour = if timestamp.rem_euclid(3_600) < 60 {
            0.4
        } else {
            0.0
        };
        let log = self.log_volume
            + 0.9 * departure
            + self.appetite
            + 0.5 * liveliness
            + on_the_hour
            + 0.5 * self.random.next();
        (libm::exp(log) * 1e8).round().max(1.0) / 1e8
    }

    /// Moves the hidden state on by a minute in which the price moved `surprise` volatilities.
    fn advance(&mut self, surprise: f64) {
        const USUAL_SURPRISE: f64 = 0.8;
        // Half-lives of one day, twenty minutes and half an hour.
        self.slow = 0.999_519 * self.slow + 0.0155 * self.random.next();
        self.fast =
            0.965_936 * self.fast + 0.10 * (surprise - USUAL_SURPRISE) + 0.10 * self.random.next();
        self.appetite = 0.977_160 * self.appetite + 0.075 * self.random.next();
    }
}

/// The clock's part of the log volatility: busiest at 15:00 UTC, quiet at the weekend.
fn clock(timestamp: i64) -> f64 {
    let minute_of_day = timestamp.rem_euclid(86_400) / 60;
    let turn = std::f64::consts::TAU * (minute_of_day - 15 * 60) as f64 / 1_440.0;
    // 1970-01-01 was a Thursday.
    let day_of_week = (timestamp.div_euclid(86_400) + 3).rem_euclid(7);
    let weekend = if day_of_week >= 5 { -0.25 } else { 0.0 };
    0.3 * libm::cos(turn) + 0.1 * libm::cos(2.0 * turn) + weekend
}

/// To whole cents, at least one.
fn ticks(price: f64) -> f64 {
    // Division by a whole number gives the double nearest to the decimal, a product would not.
    (price / TICK).round().max(1.0) / 100.0
}

/// Decides which minutes are missing.
struct Outages {
    random: Normals,
    left: u32,
}

impl Outages {
    fn new(seed: u64) -> Self {
        Self {
            random: Normals::new(seed, 1),
            left: 0,
        }
    }

    fn next_is_missing(&mut self) -> bool {
        let (lost, stop) = (self.random.uniform(), self.random.uniform());
        if self.left > 0 {
            self.left -= 1;
            return true;
        }
        if stop < 1.0 / (4.0 * 1_440.0) {
            // Five minutes to six hours, short ones as likely as long ones per factor.
            let minutes = 5.0 * libm::exp(libm::log(72.0) * self.random.uniform());
            self.left = minutes.round() as u32 - 1;
            return true;
        }
        lost < 1e-3
    }
}

/// Normal and uniform numbers from ChaCha8, by the Box-Muller transform.
struct Normals {
    source: ChaCha8Rng,
    spare: Option<f64>,
}

impl Normals {
    /// Streams of the same seed are independent.
    fn new(seed: u64, stream: u8) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8] = stream;
        Self {
            source: ChaCha8Rng::from_seed(key),
            spare: None,
        }
    }

    /// Uniform in [0, 1), 53 bits.
    fn uniform(&mut self) -> f64 {
        (self.source.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal.
    fn next(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        // 1 - u lies in (0, 1], where the logarithm is finite.
        let radius = libm::sqrt(-2.0 * libm::log(1.0 - self.uniform()));
        let (sin, cos) = libm::sincos(std::f64::consts::TAU * self.uniform());
        self.spare = Some(radius * sin);
        radius * cos
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn month() -> Vec<Candle> {
        generate(&MarketConfig::new(43_200).with_seed(3))
    }

    fn correlation(a: &[f64], b: &[f64]) -> f64 {
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        let (ma, mb) = (mean(a), mean(b));
        let dot = |x: &[f64], mx: f64, y: &[f64], my: f64| -> f64 {
            x.iter().zip(y).map(|(x, y)| (x - mx) * (y - my)).sum()
        };
        dot(a, ma, b, mb) / (dot(a, ma, a, ma) * dot(b, mb, b, mb)).sqrt()
    }

    #[test]
    fn a_seed_gives_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = |name: &str, seed: u64| {
            let path = folder.path().join(name);
            write_csv(&path, &generate(&MarketConfig::new(3_000).with_seed(seed))).unwrap();
            fs::read(path).unwrap()
        };
        let first = bytes("a.csv", 5);
        assert_eq!(first, bytes("b.csv", 5));
        assert_ne!(first, bytes("c.csv", 6));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
    }

    #[test]
    fn the_bytes_of_a_seed_never_change() {
        let candles = generate(&MarketConfig::new(3).with_seed(42));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("market.csv");
        write_csv(&path, &candles).unwrap();
        let expected = "Timestamp,Open,High,Low,Close,Volume\n\
            1704067200.0,41999.68,42000.29,41979.06,41982.09,11.72581532\n\
            1704067260.0,41982.09,41992.22,41980.17,41984.61,11.00744017\n\
            1704067320.0,41985.23,41986.87,41964.69,41979.03,12.54846948\n";
        assert_eq!(fs::read_to_string(path).unwrap(), expected);
    }

    #[test]
    fn candles_hold_together() {
        for c in month() {
            assert!(
                c.high >= c.open.max(c.close) && c.low <= c.open.min(c.close),
                "{c:?}"
            );
            assert!(
                c.low > 0.0 && c.volume > 0.0 && c.volume.is_finite(),
                "{c:?}"
            );
            let cents = c.close * 100.0;
            assert!((cents - cents.round()).abs() < 1e-6, "{c:?}");
            assert_eq!(c.timestamp % 60, 0);
        }
    }

    #[test]
    fn the_open_is_the_last_close_but_for_a_tick() {
        let candles = month();
        let (mut neighbours, mut moved) = (0, 0);
        for pair in candles.windows(2) {
            if pair[1].timestamp - pair[0].timestamp == 60 {
                neighbours += 1;
                let change = (pair[1].open / pair[0].close - 1.0).abs();
                assert!(change < 5e-5, "{pair:?}");
                moved += usize::from(change > 0.0);
            }
        }
        assert!(
            moved > neighbours / 4 && moved < neighbours * 3 / 4,
            "{moved} of {neighbours}"
        );
    }

    #[test]
    fn volatility_clusters_and_tails_are_heavy() {
        let candles = generate(&MarketConfig::new(60_000).with_seed(3).with_gaps(false));
        let returns: Vec<f64> = candles.iter().map(|c| (c.close / c.open).ln()).collect();
        let sizes: Vec<f64> = returns.iter().map(|r| r.abs()).collect();
        for lag in 1..=30 {
            let found = correlation(&sizes[lag..], &sizes[..sizes.len() - lag]);
            assert!(found > 0.1, "lag {lag}: {found}");
        }
        let own = correlation(&returns[1..], &returns[..returns.len() - 1]);
        assert!(own.abs() < 0.03, "returns cannot be forecast: {own}");
        let moment = |power: i32| returns.iter().map(|r| r.powi(power)).sum::<f64>() / 60_000.0;
        assert!(moment(4) / moment(2).powi(2) > 5.0, "kurtosis");
        let annual = (moment(2) * MINUTES_PER_YEAR).sqrt();
        assert!((0.3..1.2).contains(&annual), "annual volatility {annual}");
    }

    #[test]
    fn volume_follows_the_range_its_past_and_the_clock() {
        let candles = generate(&MarketConfig::new(60_000).with_seed(3).with_gaps(false));
        let volume: Vec<f64> = candles.iter().map(|c| c.volume.ln_1p()).collect();
        let range: Vec<f64> = candles
            .iter()
            .map(|c| (c.high / c.low).ln().sqrt())
            .collect();
        assert!(correlation(&volume, &range) > 0.4);
        assert!(correlation(&volume[1..], &volume[..59_999]) > 0.4);
        let mean_at = |hour: i64| {
            let at: Vec<f64> = candles
                .iter()
                .filter(|c| c.timestamp / 3_600 % 24 == hour)
                .map(|c| c.volume.ln_1p())
                .collect();
            at.iter().sum::<f64>() / at.len() as f64
        };
        assert!(mean_at(15) > mean_at(3) + 0.2);
    }

    #[test]
    fn gaps_are_cut_out_of_the_same_market() {
        let config = MarketConfig::new(43_200).with_seed(3);
        let whole = generate(&config.clone().with_gaps(false));
        assert_eq!(whole.len(), 43_200);
        let cut = generate(&config);
        assert!(cut.len() < 43_150 && cut.len() > 40_000, "{}", cut.len());
        let mut rest = whole.iter();
        assert!(cut.iter().all(|candle| rest.any(|other| other == candle)));
        let steps: Vec<i64> = cut
            .windows(2)
            .map(|p| p[1].timestamp - p[0].timestamp)
            .collect();
        assert!(steps.contains(&120), "single minutes");
        assert!(steps.iter().any(|&step| step > 1_800), "outages");
        assert!(steps.iter().all(|&step| step > 0 && step <= 7 * 3_600));
    }

    #[test]
    fn the_config_is_followed() {
        let config = MarketConfig::new(10)
            .with_start(1_000_000_045)
            .with_start_price(100.0)
            .with_typical_volume(3.0)
            .with_annual_volatility(0.1)
            .with_gaps(false);
        let candles = generate(&config);
        assert_eq!(candles[0].timestamp, 1_000_000_020);
        assert!((candles[9].close - 100.0).abs() < 1.0);
        assert!(generate(&MarketConfig::new(0)).is_empty());
    }

    #[test]
    #[should_panic(expected = "start_price is -1")]
    fn a_price_below_zero_is_refused() {
        generate(&MarketConfig::new(1).with_start_price(-1.0));
    }

    #[test]
    fn a_folder_that_is_not_there_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let error = write_csv(&folder.path().join("no/market.csv"), &[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
