//! Skill of several models, feature by feature, as bars.

use super::axis::{Axis, Tick};
use super::canvas::{self, Area, Drawn, Key, Panel, SERIES, panel, reason, stroke};
use crate::{Evaluation, Result};
use plotters::prelude::{Color, RGBColor, Rectangle};
use plotters::style::text_anchor::HPos;

/// Bars end here (the subtitle says so); their label keeps the number.
const FLOOR: f64 = -0.5;
const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);

/// Draws the skills of `models` (at least one, all on the same features) as an SVG document.
pub(crate) fn skill_svg(models: &[Evaluation]) -> Result<String> {
    let features = models
        .first()
        .map(Evaluation::feature_names)
        .unwrap_or_default();
    let keys: Vec<Key> = models
        .iter()
        .zip(SERIES.iter().cycle())
        .map(|(model, &color)| Key {
            label: &model.model,
            color,
            width: 9.0,
        })
        .collect();
    let (x, y) = (feature_axis(&features), skill_axis(models));
    // Ten models of long names take several lines; a page that grows keeps them off the bars.
    let legend_rows = keys.len().div_ceil(3) as f64;
    let height = 460.0 + 18.0 * legend_rows;
    canvas::page("the skills", (960, height as u32), |root| {
        canvas::headline(
            root,
            "Skill by feature",
            "1 - RMSE / RMSE of the best naive forecaster, z-score space: above zero is better than naive; bars end at -0.5",
        )?;
        let used = canvas::legend(root, &keys, 92.0, 68.0, 940.0)?;
        let (_, body) = root.split_vertically(canvas::px(70.0 + used));
        let mut panel = panel(&body, &x, &y, true)?;
        let zero = vec![(x.range.start, 0.0), (x.range.end, 0.0)];
        for (index, model) in models.iter().enumerate() {
            for (place, feature) in features.iter().enumerate() {
                let bar = Bar::new(place, index, models.len());
                let skill = model.test.get(*feature).and_then(|scores| scores.skill);
                bar.draw(root, &mut panel, skill, SERIES[index % SERIES.len()])?;
            }
        }
        canvas::line(&mut panel, zero, stroke(RGBColor(0x44, 0x44, 0x44), 1.4))
    })
}

fn feature_axis(features: &[&str]) -> Axis {
    let ticks = features.iter().enumerate().map(|(place, name)| Tick {
        at: place as f64,
        label: (*name).to_owned(),
    });
    Axis {
        range: -0.5..features.len() as f64 - 0.5,
        ticks: ticks.collect(),
        title: String::new(),
    }
}

fn skill_axis(models: &[Evaluation]) -> Axis {
    let scores = models.iter().flat_map(|model| model.test.values());
    let skills = scores.filter_map(|scores| scores.skill);
    let (low, high) = skills.fold((-0.05, 0.1), |(low, high): (f64, f64), skill| {
        (low.min(skill), high.max(skill))
    });
    Axis::linear(low.max(FLOOR) - 0.03, high + 0.03, 7, "skill")
}

/// The place of one model's bar in a feature's group.
struct Bar {
    from: f64,
    to: f64,
    label_size: f64,
}

impl Bar {
    fn new(place: usize, index: usize, count: usize) -> Self {
        let width = 0.8 / count as f64;
        let from = place as f64 - 0.4 + width * index as f64;
        Self {
            from: from + 0.04 * width,
            to: from + 0.96 * width,
            // A label of six letters has to fit the bar's width, 170 pixels a group.
            label_size: (170.0 * width / 3.6).clamp(6.0, 11.0),
        }
    }

    fn draw(
        &self,
        page: &Area,
        panel: &mut Panel,
        skill: Option<f64>,
        color: RGBColor,
    ) -> Drawn<()> {
        let end = skill.unwrap_or(0.0).max(FLOOR);
        let bar = Rectangle::new([(self.from, 0.0), (self.to, end)], color.filled());
        panel.draw_series(std::iter::once(bar)).map_err(reason)?;
        let middle = ((self.from + self.to) / 2.0, end);
        let shift = (0.0, if end < 0.0 { 9.0 } else { -9.0 });
        let style = (self.label_size, INK, HPos::Center);
        canvas::text_beside(page, panel, middle, shift, &short(skill), style)
    }
}

/// Three digits, signed.
fn short(skill: Option<f64>) -> String {
    match skill {
        None => "n/a".to_owned(),
        Some(skill) if skill.abs() < 10.0 => format!("{skill:+.3}"),
        Some(skill) if skill.abs() < 1e4 => format!("{skill:+.0}"),
        Some(skill) => format!("{skill:+.0e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluate;
    use crate::testing::market;

    #[test]
    fn shows_every_model_and_feature_and_cuts_long_bars() {
        let market = market(300);
        let decent = market.decent_predictions();
        let poor: Vec<f64> = market.targets().iter().map(|z| z + 1.0).collect();
        let models = [("decent", &decent), ("poor & far", &poor)]
            .map(|(name, predictions)| evaluate(&market.forecasts(name, predictions)).unwrap());
        let svg = skill_svg(&models).unwrap();
        for expected in ["Open", "Volume", "decent", "poor &amp; far", "skill"] {
            assert!(svg.contains(expected), "{expected}");
        }
        assert!(!svg.contains("NaN") && svg.trim_end().ends_with("</svg>"));
        assert!(models[1].test["Close"].skill.unwrap() < FLOOR);
        assert!(skill_axis(&models).range.start > FLOOR - 0.3);
    }

    #[test]
    fn labels_are_short() {
        assert_eq!(short(None), "n/a");
        assert_eq!(short(Some(0.21349)), "+0.213");
        assert_eq!(short(Some(-1244.2)), "-1244");
        assert_eq!(short(Some(-123_456.0)), "-1e5");
    }
}
