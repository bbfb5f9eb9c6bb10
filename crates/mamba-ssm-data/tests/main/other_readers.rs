//! Shards are plain Parquet: other programs open them.

use std::path::{Path, PathBuf};
use std::process::Command;

use mamba_ssm_data::{Dataset, PrepareOptions, prepare};
use tempfile::TempDir;

use crate::support::{candles, folder, python, small_windows, write};

/// A set of 1000 rows, and the path of its only shard.
fn shard(dir: &TempDir) -> (Dataset, PathBuf) {
    let csv = write(dir.path(), "c.csv", candles(1000));
    let out = dir.path().join("set");
    prepare(&PrepareOptions::new(csv, &out).with_windows(small_windows())).unwrap();
    let data = Dataset::open(&out).unwrap();
    let path = out.join(&data.manifest().unwrap().shards[0].file);
    (data, path)
}

/// The lines that a script prints about a file.
fn lines(python: &Path, script: &str, file: &Path) -> Vec<String> {
    let output = Command::new(python)
        .args(["-c", script])
        .arg(file)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(String::from).collect()
}

#[test]
fn duckdb_polars_and_pandas_open_a_shard_and_see_named_columns() {
    let dir = folder();
    let (data, shard) = shard(&dir);
    let close = f64::from(data.rows().unwrap().row(999)[3]);
    for (package, script) in [
        (
            "duckdb",
            "import sys, duckdb\n\
            names = duckdb.execute('select * from read_parquet(?) limit 0', sys.argv[1:]).description\n\
            print(','.join(name[0] for name in names))\n\
            print(*duckdb.execute('select count(*), epoch(max(timestamp)), arg_max(Close, timestamp), \
            bool_and(valid) from read_parquet(?)', sys.argv[1:]).fetchone())",
        ),
        (
            "polars",
            "import sys, polars\n\
            table = polars.read_parquet(sys.argv[1])\n\
            print(','.join(table.columns))\n\
            print(table.height, table['timestamp'][-1].timestamp(), table['Close'][-1], table['valid'].all())",
        ),
        (
            "pandas",
            "import sys, pandas\n\
            table = pandas.read_parquet(sys.argv[1])\n\
            print(','.join(table.columns))\n\
            last = table.iloc[-1]\n\
            print(len(table), last['timestamp'].timestamp(), float(last['Close']), bool(table['valid'].all()))",
        ),
    ] {
        let Some(python) = python(package) else {
            continue;
        };
        let lines = lines(&python, script, &shard);
        assert_eq!(
            lines[0], "timestamp,Open,High,Low,Close,Volume,valid",
            "{package}"
        );
        let words: Vec<&str> = lines[1].split(' ').collect();
        assert_eq!(words[0], "1000", "{package}");
        assert_eq!(
            words[1].parse::<f64>().unwrap(),
            1_600_059_960.0,
            "{package}"
        );
        assert_eq!(words[2].parse::<f64>().unwrap(), close, "{package}");
        assert_eq!(words[3], "True", "{package}");
    }
}

#[test]
fn pyarrow_opens_a_shard_and_sees_named_columns() {
    let Some(python) = python("pyarrow") else {
        return;
    };
    let dir = folder();
    let (data, shard) = shard(&dir);
    let script = "import sys, pyarrow.parquet as pq\n\
        table = pq.read_table(sys.argv[1])\n\
        print(','.join(table.column_names))\n\
        print(','.join(str(field.type) for field in table.schema))\n\
        print(table.num_rows, table['timestamp'][999].as_py().timestamp(), repr(table['Close'][999].as_py()), \
        table['valid'][999].as_py())";
    let lines = lines(&python, script, &shard);
    assert_eq!(lines[0], "timestamp,Open,High,Low,Close,Volume,valid");
    assert_eq!(
        lines[1],
        "timestamp[ms, tz=UTC],float,float,float,float,float,bool"
    );
    let close = f64::from(data.rows().unwrap().row(999)[3]);
    let last: Vec<&str> = lines[2].split(' ').collect();
    assert_eq!(last[..2], ["1000", "1600059960.0"]);
    assert_eq!(last[2].parse::<f64>().unwrap(), close);
    assert_eq!(last[3], "True");
}
