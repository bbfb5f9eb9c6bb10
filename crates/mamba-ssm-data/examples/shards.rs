//! Prepares shards from a file, or reads a set back, and says how long it took:
//! `shards prepare FILE OUT` or `shards load DIR [BATCHES]`.

use std::time::Instant;

use mamba_ssm_data::{Dataset, LoaderOptions, PrepareOptions, Split, prepare};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["prepare", file, out] => {
            let start = Instant::now();
            let summary = prepare(&PrepareOptions::new(file, out))?;
            println!(
                "{} rows, {} breaks, windows {:?}, {} shards, {:.1} MB, {:.3} s",
                summary.rows,
                summary.breaks,
                summary.windows,
                summary.shards,
                summary.bytes as f64 / 1e6,
                start.elapsed().as_secs_f64()
            );
        }
        ["load", folder] => load(folder, 200)?,
        ["load", folder, batches] => load(folder, batches.parse()?)?,
        _ => return Err("expected `prepare FILE OUT` or `load DIR [BATCHES]`".into()),
    }
    Ok(())
}

fn load(folder: &str, batches: usize) -> mamba_ssm_data::Result<()> {
    let start = Instant::now();
    let data = Dataset::open(folder)?;
    let options = LoaderOptions::new(32).shuffled(1).with_workers(2, 2);
    let mut loader = data.loader(Split::Train, &options)?;
    if let Some(first) = loader.next() {
        first?;
    }
    println!(
        "open and first batch: {:.1} ms",
        start.elapsed().as_secs_f64() * 1e3
    );

    let start = Instant::now();
    let mut windows = 0;
    for epoch in 1.. {
        for batch in data.loader(Split::Train, &options.clone().with_epoch(epoch))? {
            windows += batch?.batch;
            if windows >= batches * 32 {
                let rate = windows as f64 / start.elapsed().as_secs_f64();
                println!("{windows} windows, {rate:.0} a second");
                return Ok(());
            }
        }
    }
    Ok(())
}
