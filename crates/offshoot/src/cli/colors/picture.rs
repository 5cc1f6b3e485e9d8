//! Memory as a picture: pages as cells of a grid.
//!
//! Cells follow a Hilbert curve within squares, and squares follow one another in bands from left to right, so that
//! pages that are neighbours in memory are neighbours in the picture, and each band is one stretch of addresses that an
//! axis can name (rows alone tear what belongs together into stripes; one curve over everything has no axis).

use api::{Colors, PageState};

/// How bright a cell is: absent, ready, local (or stored), dirty.
pub(super) const LEVELS: usize = 4;

/// The brightness of a state.
pub(super) fn level(state: PageState) -> u8 {
    match state {
        PageState::Absent => 0,
        PageState::Ready => 1,
        PageState::Local | PageState::Stored => 2,
        PageState::Dirty => 3,
    }
}

/// Color and brightness of each page.
pub(super) struct Pages {
    colors: Vec<u8>,
    levels: Vec<u8>,
}

impl Pages {
    /// Unpacks what the daemon sent.
    pub(super) fn of(colors: &Colors) -> Result<Self, String> {
        let pages = usize::try_from(colors.pages).map_err(|e| e.to_string())?;
        let unpack = |what: &str, runs: &[(u64, u8)], most: usize| -> Result<Vec<u8>, String> {
            let bad = || format!("the daemon sent {what} that do not fit {pages} pages");
            let mut out = Vec::new();
            for &(run, number) in runs {
                let left = (pages - out.len()) as u64;
                if usize::from(number) >= most || run > left {
                    return Err(bad());
                }
                out.resize(out.len() + run as usize, number);
            }
            if out.len() == pages { Ok(out) } else { Err(bad()) }
        };
        let mut levels = unpack("states", &colors.state_runs, colors.states.len())?;
        levels.iter_mut().for_each(|number| *number = level(colors.states[usize::from(*number)]));
        Ok(Self { colors: unpack("colors", &colors.color_runs, colors.legend.len())?, levels })
    }

    pub(super) fn len(&self) -> usize {
        self.colors.len()
    }

    /// Color and brightness of a page.
    pub(super) fn get(&self, page: usize) -> (u8, u8) {
        (self.colors[page], self.levels[page])
    }

    /// What most of some pages are, and how bright these are in the mean.
    fn cell(&self, pages: std::ops::Range<usize>) -> Cell {
        let mut counts = [(0_u32, 0_u32); 256];
        for page in pages {
            let (color, level) = self.get(page);
            let (count, sum) = &mut counts[usize::from(color)];
            *count += 1;
            *sum += u32::from(level);
        }
        // Of equals the first: colors that nobody needs are numbered lowest, and give way.
        let (color, (count, sum)) = counts.iter().enumerate().max_by_key(|(_, (count, _))| *count).expect("colors");
        Cell { color: color as u8, level: ((sum * 2 + count) / (count * 2).max(1)) as u8 }
    }
}

/// One cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cell {
    pub(super) color: u8,
    pub(super) level: u8,
}

/// How pages are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Cells in a row: whole squares.
    pub(super) columns: usize,
    /// Cells along the side of a square: a power of two.
    pub(super) side: usize,
    /// Pages of a cell: a power of two.
    pub(super) each: usize,
    /// Pages in all.
    pub(super) pages: usize,
}

impl Layout {
    /// Of `pages` in squares of `side`, so wide, with as many pages in a cell as it takes for no more than `bands`.
    pub(super) fn new(pages: usize, columns: usize, side: usize, bands: usize) -> Self {
        assert!(
            side.is_power_of_two() && columns >= side && columns.is_multiple_of(side) && bands > 0,
            "whole squares"
        );
        let mut layout = Self { columns, side, each: 1, pages };
        while layout.bands() > bands {
            layout.each *= 2;
        }
        layout
    }

    /// Rows of squares.
    pub(super) fn bands(&self) -> usize {
        self.pages.div_ceil(self.band_pages())
    }

    /// Pages in one of them.
    pub(super) fn band_pages(&self) -> usize {
        self.columns * self.side * self.each
    }

    /// Pages in a square.
    pub(super) fn square_pages(&self) -> usize {
        self.side * self.side * self.each
    }

    /// Rows of cells.
    pub(super) fn rows(&self) -> usize {
        self.bands() * self.side
    }

    /// Column and row of a cell.
    pub(super) fn place(&self, cell: usize) -> (usize, usize) {
        let square = cell / (self.side * self.side);
        let (x, y) = hilbert(self.side, cell % (self.side * self.side));
        let across = self.columns / self.side;
        (square % across * self.side + x, square / across * self.side + y)
    }
}

/// A place on the Hilbert curve that leads from the first corner of a square to the one beside it ("Hilbert curve",
/// Wikipedia: `d2xy`).
fn hilbert(side: usize, at: usize) -> (usize, usize) {
    let (mut x, mut y, mut rest, mut step) = (0, 0, at, 1);
    while step < side {
        let right = (rest / 2) & 1;
        let up = (rest ^ right) & 1;
        if up == 0 {
            if right == 1 {
                (x, y) = (step - 1 - x, step - 1 - y);
            }
            (x, y) = (y, x);
        }
        x += step * right;
        y += step * up;
        rest /= 4;
        step *= 2;
    }
    (x, y)
}

/// The picture.
pub(super) struct Grid {
    pub(super) layout: Layout,
    /// By row; none where there is no memory any more.
    cells: Vec<Option<Cell>>,
}

impl Grid {
    pub(super) fn new(pages: &Pages, layout: Layout) -> Self {
        let mut cells = vec![None; layout.columns * layout.rows()];
        for (cell, first) in (0..pages.len()).step_by(layout.each).enumerate() {
            let (x, y) = layout.place(cell);
            cells[y * layout.columns + x] = Some(pages.cell(first..pages.len().min(first + layout.each)));
        }
        Self { layout, cells }
    }

    pub(super) fn get(&self, x: usize, y: usize) -> Option<Cell> {
        self.cells.get(y * self.layout.columns + x).copied().flatten()
    }

    /// Runs of equal cells in a row: first column, length, cell.
    pub(super) fn runs(&self, y: usize) -> impl Iterator<Item = (usize, usize, Cell)> + '_ {
        let row = &self.cells[y * self.layout.columns..(y + 1) * self.layout.columns];
        let mut at = 0;
        row.chunk_by(|a, b| a == b).filter_map(move |run| {
            let start = at;
            at += run.len();
            run[0].map(|cell| (start, run.len(), cell))
        })
    }
}

/// The guest-physical address of a page.
pub(super) fn address(colors: &Colors, page: usize) -> u64 {
    let page = page as u64;
    let region = colors.regions.iter().find(|r| r.page <= page && page < r.page + r.pages);
    region.map_or(page * colors.page_bytes, |r| r.physical + (page - r.page) * colors.page_bytes)
}

/// A byte count as an axis has it: whole where it is.
pub(super) fn round(bytes: u64) -> String {
    if bytes == 0 { "0".into() } else { base::units::human(bytes).replace(".0 ", " ") }
}
