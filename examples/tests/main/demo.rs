//! The example without a command: what a newcomer sees.

use super::workshop::Workshop;

/// The table of skills, then the paths of the metrics, the report and the plots, and nothing after them.
#[test]
fn the_last_lines_are_the_skills_and_where_everything_is() {
    let shop = Workshop::new();
    // As short a training as can be: the first step is always taken.
    let output = shop.must("--minutes 0.0001");
    let lines: Vec<&str> = output.lines().filter(|line| !line.is_empty()).collect();
    let (table, paths) = lines[lines.len() - 15..].split_at(7);
    assert!(
        table[0].starts_with("feature") && table[0].contains("skill"),
        "{output}"
    );
    let names = ["Open", "High", "Low", "Close", "Volume", "average"];
    for (line, name) in table[1..].iter().zip(names) {
        let mut cells = line.split_whitespace();
        assert_eq!(cells.next(), Some(name), "{output}");
        let numbers: Vec<f64> = cells
            .by_ref()
            .take(3)
            .map_while(|c| c.parse().ok())
            .collect();
        assert_eq!(numbers.len(), 3, "rmse, naive rmse and skill: {line}");
    }
    let kinds = ["metrics:", "report:"]
        .into_iter()
        .chain(std::iter::repeat_n("plot:", 6));
    for (line, kind) in paths.iter().zip(kinds) {
        let path = line
            .strip_prefix(kind)
            .unwrap_or_else(|| panic!("{kind} {line}"))
            .trim();
        assert!(path.starts_with("runs/small/"), "{line}");
        assert!(shop.path(path).is_file(), "{line}");
    }
    let below = std::fs::read_dir(shop.path(".")).expect("the folder");
    assert_eq!(below.count(), 1, "everything lands below runs");
}
