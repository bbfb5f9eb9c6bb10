//! The house style: a page of SVG with panels, titles and legends.

use super::axis::Axis;
use crate::{EvalError, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::fmt::Display;

/// The backend draws on whole pixels; drawing larger and showing smaller keeps lines smooth.
const OVERSAMPLING: u32 = 4;

pub(crate) const TRUTH: RGBColor = RGBColor(0x22, 0x22, 0x22);
pub(crate) const MODEL: RGBColor = RGBColor(0x00, 0x72, 0xB2);
pub(crate) const NAIVE: RGBColor = RGBColor(0xD5, 0x5E, 0x00);
/// Of lines drawn wide and first, so that they show on both sides of whatever covers them.
pub(crate) const NAIVE_PALE: RGBColor = RGBColor(0xF5, 0xB9, 0x7F);
/// Okabe and Ito's colours, which most colour-blind readers can tell apart.
pub(crate) const SERIES: [RGBColor; 7] = [
    MODEL,
    RGBColor(0x00, 0x9E, 0x73),
    RGBColor(0xCC, 0x79, 0xA7),
    RGBColor(0xE6, 0x9F, 0x00),
    RGBColor(0x56, 0xB4, 0xE9),
    NAIVE,
    RGBColor(0x66, 0x66, 0x66),
];
const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
const MUTED: RGBColor = RGBColor(0x66, 0x66, 0x66);
const GRID: RGBColor = RGBColor(0xE4, 0xE4, 0xE4);

/// A drawing area of the page.
pub(crate) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// A panel with axes, ready for lines.
pub(crate) type Panel<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<Axis, Axis>>;
/// A drawing step's outcome; the library's reason as text.
pub(crate) type Drawn<T> = std::result::Result<T, String>;

/// Turns the library's errors into text.
pub(crate) fn reason(error: impl Display) -> String {
    error.to_string()
}

/// Pixels of the page in the backend's units.
pub(crate) fn px(pixels: f64) -> i32 {
    (pixels * f64::from(OVERSAMPLING)).round() as i32
}

/// A line style of `width` pixels.
pub(crate) fn stroke(color: RGBColor, width: f64) -> ShapeStyle {
    ShapeStyle {
        color: color.to_rgba(),
        filled: false,
        stroke_width: px(width) as u32,
    }
}

/// Renders a page of `width` x `height` pixels.
pub(crate) fn page(
    plot: &str,
    (width, height): (u32, u32),
    draw: impl FnOnce(&Area) -> Drawn<()>,
) -> Result<String> {
    let size = (width * OVERSAMPLING, height * OVERSAMPLING);
    let mut svg = String::new();
    let drawn = {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let drawn = root.fill(&WHITE).map_err(reason);
        drawn
            .and_then(|()| draw(&root))
            .and_then(|()| root.present().map_err(reason))
    };
    drawn.map_err(|reason| EvalError::Plot {
        plot: plot.to_owned(),
        reason,
    })?;
    let large = format!("width=\"{}\" height=\"{}\" viewBox", size.0, size.1);
    let shown = format!("width=\"{width}\" height=\"{height}\" viewBox");
    Ok(svg.replacen(&large, &shown, 1))
}

/// Text at a pixel of `area`, anchored on its left, middle or right and centred vertically.
pub(crate) fn text(
    area: &Area,
    content: &str,
    (x, y): (f64, f64),
    size: f64,
    color: RGBColor,
    anchor: HPos,
) -> Drawn<()> {
    let style = ("sans-serif", px(size))
        .into_text_style(area)
        .color(&color)
        .pos(Pos::new(anchor, VPos::Center));
    area.draw_text(content, &style, (px(x), px(y)))
        .map_err(reason)
}

/// Heading and a muted line below it, at the top left.
pub(crate) fn headline(area: &Area, title: &str, subtitle: &str) -> Drawn<()> {
    text(area, title, (16.0, 20.0), 17.0, INK, HPos::Left)?;
    text(area, subtitle, (16.0, 41.0), 12.0, MUTED, HPos::Left)
}

/// An entry of a legend.
pub(crate) struct Key<'a> {
    pub label: &'a str,
    pub color: RGBColor,
    pub width: f64,
}

/// At most `letters` of a name, the rest as an ellipsis.
pub(crate) fn shorten(name: &str, letters: usize) -> String {
    if name.chars().count() <= letters {
        return name.to_owned();
    }
    name.chars().take(letters - 1).chain(['…']).collect()
}

/// Entries from left to right at height `y`, starting at `x`; wraps before `until`. Returns the
/// height used, in pixels.
pub(crate) fn legend(area: &Area, keys: &[Key], x: f64, y: f64, until: f64) -> Drawn<f64> {
    let (mut left, mut top) = (x, y);
    for key in keys {
        let label = shorten(key.label, 60);
        // Fonts differ between viewers; 6.6 pixels a letter at size 12 leaves room for wide ones.
        let width = 34.0 + 6.6 * label.chars().count() as f64 + 16.0;
        if left > x && left + width > until {
            (left, top) = (x, top + 18.0);
        }
        let line = vec![(px(left), px(top)), (px(left + 24.0), px(top))];
        area.draw(&PathElement::new(line, stroke(key.color, key.width)))
            .map_err(reason)?;
        text(area, &label, (left + 30.0, top), 12.0, INK, HPos::Left)?;
        left += width;
    }
    Ok(top + 18.0 - y)
}

/// A panel with axes, grid and tick labels. `bottom` tells whether the x axis is labelled.
pub(crate) fn panel<'a>(area: &Area<'a>, x: &Axis, y: &Axis, bottom: bool) -> Drawn<Panel<'a>> {
    let mut chart = ChartBuilder::on(area)
        .margin_right(px(20.0))
        .margin_top(px(8.0))
        .margin_left(px(20.0))
        .margin_bottom(px(if bottom { 8.0 } else { 0.0 }))
        .x_label_area_size(px(if bottom { 44.0 } else { 8.0 }))
        .y_label_area_size(px(72.0))
        .build_cartesian_2d(if bottom { x.clone() } else { x.unlabelled() }, y.clone())
        .map_err(reason)?;
    let label = ("sans-serif", px(11.5)).into_text_style(area).color(&INK);
    let title = ("sans-serif", px(12.0)).into_text_style(area).color(&MUTED);
    let mut mesh = chart.configure_mesh();
    mesh.label_style(label)
        .axis_desc_style(title)
        .axis_style(stroke(MUTED, 1.0))
        .bold_line_style(stroke(GRID, 1.0))
        .light_line_style(TRANSPARENT)
        .set_all_tick_mark_size(px(4.0))
        .y_desc(&y.title);
    if bottom {
        mesh.x_desc(&x.title);
    }
    mesh.draw().map_err(reason)?;
    Ok(chart)
}

/// A line through points in plotting coordinates.
pub(crate) fn line(panel: &mut Panel, points: Vec<(f64, f64)>, style: ShapeStyle) -> Drawn<()> {
    panel
        .draw_series(std::iter::once(PathElement::new(points, style)))
        .map_err(reason)?;
    Ok(())
}

/// Text beside a point of a panel, moved by `shift` pixels; `page` is the whole page.
pub(crate) fn text_beside(
    page: &Area,
    panel: &Panel,
    point: (f64, f64),
    shift: (f64, f64),
    content: &str,
    (size, color, anchor): (f64, RGBColor, HPos),
) -> Drawn<()> {
    let (x, y) = panel.backend_coord(&point);
    let scale = f64::from(OVERSAMPLING);
    let at = (
        f64::from(x) / scale + shift.0,
        f64::from(y) / scale + shift.1,
    );
    text(page, content, at, size, color, anchor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_are_cut() {
        assert_eq!(shorten("mamba2", 6), "mamba2");
        assert_eq!(shorten("mamba2 größer", 10), "mamba2 gr…");
    }

    #[test]
    fn pages_are_shown_at_their_size_and_drawn_larger() {
        let svg = page("x", (100, 50), |_| Ok(())).unwrap();
        assert!(
            svg.contains(r#"width="100" height="50" viewBox="0 0 400 200""#),
            "{svg}"
        );
        let error = page("the page", (9, 9), |_| Err("why".to_owned())).unwrap_err();
        assert_eq!(error.to_string(), "cannot draw the page: why");
    }
}
