//! SVG plots. Text stays text: no font is loaded, so nothing of the system is needed.

mod axis;
mod canvas;
mod forecast;
mod loss;
mod skill;

pub use forecast::{ForecastPlot, forecast_svg};
pub(crate) use loss::best_epoch;
pub use loss::{EpochRecord, loss_svg};
pub(crate) use skill::skill_svg;
