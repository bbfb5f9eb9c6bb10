//! Shards are plain Parquet: other programs open them.

use std::process::Command;

use mamba_ssm_data::{Dataset, PrepareOptions, prepare};

use crate::support::{candles, folder, python, small_windows, write};

#[test]
fn pyarrow_opens_a_shard_and_sees_named_columns() {
    let Some(python) = python("pyarrow") else {
        return;
    };
    let dir = folder();
    let csv = write(dir.path(), "c.csv", candles(1000));
    prepare(&PrepareOptions::new(csv, dir.path().join("set")).with_windows(small_windows()))
        .unwrap();
    let data = Dataset::open(dir.path().join("set")).unwrap();
    let shard = dir
        .path()
        .join("set")
        .join(&data.manifest().unwrap().shards[0].file);
    let script = "import sys, pyarrow.parquet as pq\n\
        table = pq.read_table(sys.argv[1])\n\
        print(','.join(table.column_names))\n\
        print(','.join(str(field.type) for field in table.schema))\n\
        print(table.num_rows, table['timestamp'][999].as_py().timestamp(), repr(table['Close'][999].as_py()), \
        table['valid'][999].as_py())";
    let output = Command::new(python)
        .args(["-c", script])
        .arg(&shard)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = text.lines().collect();
    assert!(output.status.success() && lines.len() == 3, "{errors}");
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
