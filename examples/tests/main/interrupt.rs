//! Ctrl-C, as a terminal sends it.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

use super::workshop::{TINY, Workshop};

/// The program says that it is training, is interrupted, saves, and exits as a shell expects; the run goes on.
#[test]
fn ctrl_c_saves_the_run_and_resume_goes_on() {
    let shop = Workshop::with_shards(2000);
    shop.write(
        "long.toml",
        TINY.replace(
            "epochs = 1\n",
            "epochs = 100000\nearly_stopping_patience = 0\n",
        ),
    );
    let line = "train --data @shards --out @run --preset anchored --config @long.toml";
    let mut command = shop.command(line);
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a start");
    let mut stderr = BufReader::new(child.stderr.take().expect("a pipe"));
    let mut first = String::new();
    stderr.read_line(&mut first).expect("a line of progress");
    assert!(first.contains("epoch 1"), "{first}");

    let sent = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status();
    assert!(sent.expect("kill runs").success());
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).expect("the other lines");
    let status = child.wait().expect("an end");
    assert_eq!(status.code(), Some(130), "{rest}");
    for word in [
        "stopping after this step",
        "interrupted; the run is saved",
        "--resume",
    ] {
        assert!(rest.contains(word), "{word}: {rest}");
    }

    let state = || shop.json("run/checkpoints/last/state.json");
    let number = |key: &str| {
        state()[key]
            .as_u64()
            .unwrap_or_else(|| panic!("{key}: {}", state()))
    };
    let (step, epoch) = (number("step"), number("epoch"));
    assert!(step > 0);
    shop.must(&format!(
        "train --data @shards --out @run --epochs {} --resume",
        epoch + 1
    ));
    assert_eq!(number("epoch"), epoch + 1);
    // Two steps an epoch: none was taken twice, none left out.
    assert_eq!(number("step"), 2 * (epoch + 1));
}
