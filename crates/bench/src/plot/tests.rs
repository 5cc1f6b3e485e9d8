use super::*;

fn series(name: &str, points: &[(f64, &[f64])]) -> Series {
    let points = points.iter().map(|&(x, runs)| Point { x, runs: runs.to_vec() }).collect();
    Series { name: name.into(), points }
}

fn lines(across: Across, series: Vec<Series>) -> String {
    let (title, subtitle) = ("Time & <space>".into(), "here".into());
    Lines { title, subtitle, x: "instances".into(), y: "seconds".into(), across, series }.svg()
}

/// Values of an attribute of the elements that hold `within`, in order.
fn values(svg: &str, within: &str, attribute: &str) -> Vec<f64> {
    let key = format!(" {attribute}=\"");
    let found = svg.lines().filter(|line| line.contains(within));
    let texts = found.filter_map(|line| Some(line.split_once(&key)?.1.split_once('"')?.0));
    texts.map(|text| text.parse().unwrap()).collect()
}

#[test]
fn ticks_are_round_and_cover() {
    for (highest, step, top) in [(16.0, 5.0, 20.0), (1.0, 0.2, 1.0), (0.047, 0.01, 0.05), (150.0, 50.0, 150.0)] {
        let (ticks, end) = round_ticks(highest);
        assert!((ticks[1] - step).abs() < 1e-9, "{highest}: {ticks:?}");
        assert!((end - top).abs() < 1e-9, "{highest}: {end}");
    }
    assert_eq!(round_ticks(0.0).1, 1.0);
    assert_eq!(round_ticks(f64::NAN).1, 1.0);
}

#[test]
fn numbers_are_short() {
    for (value, text) in [(0.0, "0"), (0.25, "0.25"), (2.5, "2.5"), (16.0, "16"), (100.0, "100"), (1234.5, "1234")] {
        assert_eq!(number(value), text);
    }
}

#[test]
fn points_stand_where_they_belong() {
    let svg = lines(Across::Doubling, vec![series("a", &[(1.0, &[1.0]), (2.0, &[2.0]), (4.0, &[4.0])])]);
    // The first circle is the legend's.
    let (x, y) = (values(&svg, "<circle", "cx"), values(&svg, "<circle", "cy"));
    assert_eq!(x.len(), 4);
    assert!((x[2] - x[1] - (x[3] - x[2])).abs() < 0.2, "each doubling is as far: {x:?}");
    assert!((y[1] - y[2]) * 1.9 < y[2] - y[3] && y[2] > y[3], "higher values stand higher: {y:?}");
    let even = lines(Across::Linear, vec![series("a", &[(1.0, &[1.0]), (2.0, &[2.0]), (4.0, &[4.0])])]);
    let x = values(&even, "<circle", "cx");
    assert!(((x[3] - x[2]) / (x[2] - x[1]) - 2.0).abs() < 0.02, "{x:?}");
}

#[test]
fn bars_reach_from_least_to_most_and_only_where_there_are_several() {
    let svg = lines(Across::Linear, vec![series("a", &[(1.0, &[3.0, 1.0, 2.0]), (2.0, &[2.0])])]);
    assert_eq!(svg.matches("stroke-width=\"1.2\"").count(), 1);
    let groups = vec!["read".into(), "write".into()];
    let bars = vec![series("a", &[(0.0, &[5.0]), (1.0, &[10.0])]), series("b", &[(0.0, &[1.0])])];
    let svg = Bars { title: "t".into(), subtitle: String::new(), y: "MB/s".into(), groups, series: bars }.svg();
    let heights = values(&svg, "fill=\"#0072b2\"", "height");
    assert!((heights[1] / heights[0] - 2.0).abs() < 0.01, "{heights:?}");
}

#[test]
fn what_is_written_is_escaped_and_closed() {
    let svg = lines(Across::Linear, vec![]);
    assert!(svg.contains("Time &amp; &lt;space&gt;") && !svg.contains("NaN"));
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
}
