//! Mamba-2 against attention over the length of one sequence: time and peak memory of a layer, forwards and
//! backwards, as a table and as a picture.
//!
//! `cargo bench -p benches --bench scaling` on the CPU; with `--features cuda` (or
//! another device) lengths to 262,144 run, in bf16 where the device has it. `MAMBA_SCALING_SVG` names the
//! picture (default `scaling.svg` in the working directory).

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use benches::{ACCELERATOR, dtype, finish, held_mebibytes};
use burn::module::Module;
use burn::tensor::{Device, Distribution, Tensor};
use mamba_ssm_attention::AttentionConfig;
use mamba_ssm_core::Mamba2Config;
use plotters::prelude::*;

/// Tokens of the shortest sequence.
const SHORTEST: usize = 512;

/// A length whose calls take longer than this is a layer's last, in seconds.
const LONGEST_CALL: f64 = 5.0;

/// Set for a process that measures one layer: which.
const LAYER: &str = "MAMBA_SCALING_LAYER";

/// One layer at one length.
struct Point {
    length: usize,
    milliseconds: f64,
    /// What the device's allocator held at the end, where it says.
    mebibytes: Option<f64>,
}

struct Curve {
    name: &'static str,
    color: RGBColor,
    points: Vec<Point>,
}

fn lengths() -> impl Iterator<Item = usize> {
    let last = if ACCELERATOR { 262_144 } else { 16_384 };
    (0..)
        .map(|n| SHORTEST << n)
        .take_while(move |length| *length <= last)
}

/// The quickest of the first calls, which compile and tune.
fn warm_up(once: impl Fn() -> f64) -> f64 {
    let mut quickest = once().min(once());
    let mut spent = 0.0;
    for _ in 0..40 {
        if spent > 1.0 {
            break;
        }
        let time = once();
        (quickest, spent) = (quickest.min(time), spent + time);
    }
    quickest
}

/// Times a layer at every length, until a call takes too long; prints a line for each.
fn measure<M: Module>(
    layer: impl Fn(&Device) -> M,
    run: impl Fn(&M, Tensor<3>) -> Tensor<3>,
) -> Vec<Point> {
    let device = Device::default().autodiff();
    let layer = layer(&device);
    let dtype = dtype(&device);
    let mut points = Vec::new();
    // The shortest twice: fusion looks for what to fuse during many of a process's first calls.
    for (turn, length) in std::iter::once(SHORTEST).chain(lengths()).enumerate() {
        finish(&device);
        device.memory_cleanup();
        let normal = Distribution::Normal(0.0, 1.0);
        let x = Tensor::<3>::random([1, length, 64], normal, &device).cast(dtype);
        let once = || {
            let start = Instant::now();
            drop(run(&layer, x.clone()).sum().backward());
            finish(&device);
            start.elapsed().as_secs_f64()
        };
        let slow = warm_up(once);
        let calls = (0.5 / slow).clamp(3.0, 50.0) as usize;
        let mut times: Vec<f64> = (0..calls).map(|_| once()).collect();
        if turn == 0 {
            continue;
        }
        times.sort_by(f64::total_cmp);
        let point = Point {
            length,
            milliseconds: times[calls / 2] * 1e3,
            mebibytes: held_mebibytes(&device),
        };
        // Read again by the process that draws.
        let mebibytes = point.mebibytes.unwrap_or(f64::NAN);
        println!("{length} {} {mebibytes}", point.milliseconds);
        points.push(point);
        if slow > LONGEST_CALL {
            break;
        }
    }
    points
}

/// One panel: a quantity over the length, both logarithmic.
fn panel(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    curves: &[Curve],
    value: impl Fn(&Point) -> Option<f64>,
) -> Result<(), Box<dyn std::error::Error>> {
    let values: Vec<f64> = curves
        .iter()
        .flat_map(|c| c.points.iter().filter_map(&value))
        .collect();
    let (Some(low), Some(high)) = (
        values.iter().copied().reduce(f64::min),
        values.iter().copied().reduce(f64::max),
    ) else {
        return Ok(());
    };
    let last = lengths().last().unwrap_or(SHORTEST) as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(
            (SHORTEST as f64..last).log_scale(),
            (low / 1.5..high * 1.5).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc("tokens")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y}"))
        .light_line_style(WHITE)
        .draw()?;
    for curve in curves {
        let points: Vec<(f64, f64)> = curve
            .points
            .iter()
            .filter_map(|point| Some((point.length as f64, value(point)?)))
            .collect();
        let color = curve.color;
        chart
            .draw_series(LineSeries::new(points.clone(), color.stroke_width(2)))?
            .label(curve.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
        chart.draw_series(
            points
                .into_iter()
                .map(|at| Circle::new(at, 4, color.filled())),
        )?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()?;
    Ok(())
}

/// Whether the filters of the command line, if any, mean this benchmark.
fn is_wanted() -> bool {
    let filters: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with('-'))
        .collect();
    filters.is_empty() || filters.iter().any(|filter| "scaling".contains(filter))
}

/// Measures one of the two layers.
fn measure_named(name: &str) -> Vec<Point> {
    match name {
        "Mamba-2" => measure(
            |device| {
                let config = Mamba2Config::new(64).with_d_state(64);
                config.with_headdim(16).with_expand(4).init(device)
            },
            |layer, x| layer.forward(x),
        ),
        _ => measure(
            |device| AttentionConfig::new(64, 8).init(device),
            |layer, x| layer.forward(x),
        ),
    }
}

/// Measures a layer in a process of its own: an allocator keeps what another layer once needed.
fn measure_apart(name: &'static str, color: RGBColor) -> Result<Curve, Box<dyn std::error::Error>> {
    let mut child = Command::new(std::env::current_exe()?)
        .env(LAYER, name)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut points = Vec::new();
    for line in BufReader::new(child.stdout.take().expect("a pipe")).lines() {
        let line = line?;
        let numbers: Vec<f64> = line
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let [length, milliseconds, mebibytes] = numbers[..] else {
            return Err(format!("{name}: not a measurement: {line}").into());
        };
        println!("{name:<10} {length:>8} tokens {milliseconds:>12.3} ms {mebibytes:>8.0} MiB");
        points.push(Point {
            length: length as usize,
            milliseconds,
            mebibytes: (!mebibytes.is_nan()).then_some(mebibytes),
        });
    }
    if !child.wait()?.success() {
        return Err(format!("{name}: the measurement failed").into());
    }
    Ok(Curve {
        name,
        color,
        points,
    })
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if let Ok(name) = std::env::var(LAYER) {
        measure_named(&name);
        return Ok(());
    }
    if !is_wanted() {
        return Ok(());
    }
    let curves = [
        measure_apart("Mamba-2", RGBColor(0x00, 0x72, 0xB2))?,
        measure_apart("attention", RGBColor(0xD5, 0x5E, 0x00))?,
    ];
    let path = std::env::var("MAMBA_SCALING_SVG").unwrap_or_else(|_| "scaling.svg".to_owned());
    let root = SVGBackend::new(&path, (1100, 460)).into_drawing_area();
    root.fill(&WHITE)?;
    let (left, right) = root.split_horizontally(550);
    panel(&left, "forward and backward, ms", &curves, |point| {
        Some(point.milliseconds)
    })?;
    panel(&right, "memory of the device, MiB", &curves, |point| {
        point.mebibytes
    })?;
    root.present()?;
    println!("{path}");
    Ok(())
}
