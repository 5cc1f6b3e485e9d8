//! Which paint a color and a brightness get.
//!
//! Hues are those of the palette; brightness is that of OKLCH (Björn Ottosson, "A perceptual color space for image
//! processing", 2020), in which equal numbers look equally bright whatever the hue. So who cannot tell two hues apart
//! still sees what is dirty, local or absent. What nobody needs (free, zero) is grey and stays near the background.

use super::picture::LEVELS;
use api::ColorCount;

/// Red, green, blue.
pub(super) type Rgb = [u8; 3];

/// What is behind the picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ground {
    Light,
    Dark,
}

/// Below this a color of the palette is a grey.
const GREY: u8 = 20;
/// The strongest color there is of it; what the screen cannot show is weakened until it can.
const CHROMA: f64 = 0.19;

/// By brightness: lightness and part of the chroma of colors, and lightness of greys.
type Scale = ([(f64, f64); LEVELS], [f64; LEVELS]);

const DARK: Scale = ([(0.33, 0.45), (0.46, 0.70), (0.60, 0.95), (0.765, 1.0)], [0.235, 0.30, 0.40, 0.54]);
const LIGHT: Scale = ([(0.91, 0.30), (0.83, 0.60), (0.715, 0.95), (0.545, 1.0)], [0.965, 0.92, 0.85, 0.72]);

/// The paint of a cell.
pub(super) fn paint(color: &ColorCount, level: u8, ground: Ground) -> Rgb {
    let (colors, greys) = if ground == Ground::Dark { &DARK } else { &LIGHT };
    let level = usize::from(level).min(LEVELS - 1);
    let hue = hue_of(color.degrees);
    if color.saturation < GREY {
        // Free, zero, unknown: ever a little farther from the ground.
        let step = if ground == Ground::Dark { 0.035 } else { -0.03 };
        let (steps, chroma) = match color.saturation {
            0 => (2.0, 0.0),
            1..=10 => (0.0, 0.012),
            _ => (1.0, 0.012),
        };
        return oklch(greys[level] + step * steps, chroma, hue);
    }
    let (lightness, part) = colors[level];
    oklch(lightness, CHROMA * part * f64::from(color.saturation) / 80.0, hue)
}

/// The hue of OKLCH, in radians, of the purest color of so many degrees on the usual wheel.
fn hue_of(degrees: u16) -> f64 {
    let sector = f64::from(degrees % 360) / 60.0;
    let rise = 1.0 - (sector % 2.0 - 1.0).abs();
    let rgb = match sector as u8 {
        0 => [1.0, rise, 0.0],
        1 => [rise, 1.0, 0.0],
        2 => [0.0, 1.0, rise],
        3 => [0.0, rise, 1.0],
        4 => [rise, 0.0, 1.0],
        _ => [1.0, 0.0, rise],
    };
    let [r, g, b] = rgb.map(|v: f64| if v <= 0.04045 { v / 12.92 } else { ((v + 0.055) / 1.055).powf(2.4) });
    let l = (0.412_221_470_8 * r + 0.536_332_536_3 * g + 0.051_445_992_9 * b).cbrt();
    let m = (0.211_903_498_2 * r + 0.680_699_545_1 * g + 0.107_396_956_6 * b).cbrt();
    let s = (0.088_302_461_9 * r + 0.281_718_837_6 * g + 0.629_978_700_5 * b).cbrt();
    let a = 1.977_998_495_1 * l - 2.428_592_205_0 * m + 0.450_593_709_9 * s;
    let b = 0.025_904_037_1 * l + 0.782_771_766_2 * m - 0.808_675_766_0 * s;
    b.atan2(a)
}

/// The strongest color up to `chroma` that the screen can show.
fn oklch(lightness: f64, chroma: f64, hue: f64) -> Rgb {
    let (mut low, mut high) = (0.0, chroma);
    if let Some(rgb) = shown(lightness, chroma, hue) {
        return rgb;
    }
    for _ in 0..20 {
        let middle = (low + high) / 2.0;
        if shown(lightness, middle, hue).is_some() {
            low = middle;
        } else {
            high = middle;
        }
    }
    shown(lightness, low, hue).unwrap_or([(lightness * 255.0) as u8; 3])
}

/// The color in sRGB, where it has it.
fn shown(lightness: f64, chroma: f64, hue: f64) -> Option<Rgb> {
    let (a, b) = (chroma * hue.cos(), chroma * hue.sin());
    let l = (lightness + 0.396_337_777_4 * a + 0.215_803_757_3 * b).powi(3);
    let m = (lightness - 0.105_561_345_8 * a - 0.063_854_172_8 * b).powi(3);
    let s = (lightness - 0.089_484_177_5 * a - 1.291_485_548_0 * b).powi(3);
    let linear = [
        4.076_741_662_1 * l - 3.307_711_591_3 * m + 0.230_969_929_2 * s,
        -1.268_438_004_6 * l + 2.609_757_401_1 * m - 0.341_319_396_5 * s,
        -0.004_196_086_3 * l - 0.703_418_614_7 * m + 1.707_614_701_0 * s,
    ];
    if linear.iter().any(|v| !(-1e-4..=1.0001).contains(v)) {
        return None;
    }
    let coded = linear.map(|v: f64| if v <= 0.003_130_8 { 12.92 * v } else { 1.055 * v.powf(1.0 / 2.4) - 0.055 });
    Some(coded.map(|v| (v.clamp(0.0, 1.0) * 255.0).round() as u8))
}

/// As documents write it.
pub(super) fn hex([r, g, b]: Rgb) -> String {
    // Three digits where these say the same.
    let short = |v: u8| v.is_multiple_of(17);
    if short(r) && short(g) && short(b) {
        return format!("#{:x}{:x}{:x}", r / 17, g / 17, b / 17);
    }
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// The nearest of the 256 colors of a terminal: its cube of 6, or its greys.
pub(super) fn nearest([r, g, b]: Rgb) -> u8 {
    const STEPS: [u8; 6] = [0, 95, 135, 175, 215, 255];
    let distance = |a: Rgb| -> u32 { a.iter().zip([r, g, b]).map(|(x, y)| u32::from(x.abs_diff(y)).pow(2)).sum() };
    let step = |v: u8| (0..6).min_by_key(|&i| STEPS[i].abs_diff(v)).unwrap_or(0);
    let cube = [r, g, b].map(step);
    let grey = (0..24_u8).min_by_key(|&i| distance([8 + 10 * i; 3])).unwrap_or(0);
    if distance(cube.map(|i| STEPS[i])) <= distance([8 + 10 * grey; 3]) {
        (16 + 36 * cube[0] + 6 * cube[1] + cube[2]) as u8
    } else {
        232 + grey
    }
}
