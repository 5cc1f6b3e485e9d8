//! What a guest's memory says about itself: the *color* of each page, read from outside and at rest.
//!
//! A frozen Linux guest describes its own memory. A note of its kernel (`VMCOREINFO`, made for crash dumps) says where
//! the root of the page tables and the page descriptors lie and how they are laid out; the descriptors say which pages
//! are free, slab, page cache or anonymous; the page tables say which of them are executed, by whom. [`color`] puts the
//! three together, without symbols, without an agent, and without reading more than a few percent of the memory:
//!
//! ```text
//!   note ──► numbers of this kernel ──► descriptors, a color for each page ──► kernel's tables ──► processes' tables
//!   (note)   (kernel)                   (descriptors)                          (mappings)          (mappings)
//! ```
//!
//! A guest that is no Linux, or that cannot be read, falls back to what the architecture tells: the page tables that
//! its processor stood on. [`Account`] says which of them it was, and why.
//!
//! What is read was written by the guest, which may be hostile: every read goes through [`reader::Reader`], which
//! checks it against the guest's RAM and counts it, so that time and memory stay in proportion to the guest's size.
//! Wrong contents give wrong colors to that guest and nothing else; an error means that the host failed to read.
//!
//! What follows from it for whoever fetches pages is in [`plan`].
//!
//! This crate knows no file, no hypervisor and no clock, and has no unsafe code.

#[cfg(test)]
#[macro_use]
#[path = "../../base/fuzz/edits.rs"]
mod edits;

mod color;
mod descriptors;
mod free;
mod kept;
mod kernel;
mod mappings;
mod memory;
mod note;
mod paging;
pub mod plan;
mod reader;

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;

pub use color::{Account, Basis, Color, Coloring, Hue};
pub use free::FreePages;
pub use memory::{Cpu, Error, Hint, Memory, Region};

use base::PAGE;
use kernel::Kernel;
use mappings::Mappings;
use reader::{Reader, Stop};

/// Colors every page of a frozen guest.
///
/// `cpu` is the state of one of its processors, where it is known: all that is left where the guest is not understood.
/// `hint` is what an earlier coloring of the same guest returned; it saves a search, and is checked.
///
/// # Errors
/// Where the regions contradict each other, or the host could not read the memory. Never for what it holds.
pub fn color(memory: &dyn Memory, cpu: Option<Cpu>, hint: Option<Hint>) -> Result<Coloring, Error> {
    let mut reader = Reader::new(memory)?;
    let mut coloring = Coloring::unknown(reader.pages(), Account::new());
    match linux(&mut reader, &mut coloring, cpu, hint) {
        Ok(()) => {}
        Err(Stop::Host(error)) => return Err(error),
        Err(stop) => {
            coloring.forget();
            coloring.account.notes.push(format!("not read as Linux: {stop}"));
            architecture(&mut reader, &mut coloring, cpu)?;
        }
    }
    for range in memory.zeros() {
        coloring.zero(range.start.div_ceil(PAGE)..range.end / PAGE);
    }
    coloring.account.bytes_read = reader.bytes_read();
    Ok(coloring)
}

fn linux(reader: &mut Reader, coloring: &mut Coloring, cpu: Option<Cpu>, hint: Option<Hint>) -> Result<(), Stop> {
    let found = Kernel::find(reader, cpu, hint)?;
    let kernel = &found.kernel;
    coloring.account.adopt(kernel, found.note);
    let survey = descriptors::survey(reader, kernel, coloring)?;
    coloring.account.basis = Basis::Descriptors;
    if survey.inconsistent > 0 {
        let notes = &mut coloring.account.notes;
        notes.push(format!("{} descriptors contradict each other; their pages count as used", survey.inconsistent));
    }
    let mut mappings = Mappings::new(reader.pages());
    // What the tables add is a refinement: where they end early, the descriptors still stand.
    let refined = mappings
        .kernel(reader, kernel, &survey, coloring)
        .and_then(|()| mappings.roots(reader, kernel, &survey, cpu, coloring));
    match refined {
        Ok(roots) => coloring.account.roots = roots,
        Err(Stop::Host(error)) => return Err(Stop::Host(error)),
        Err(stop) => coloring.account.notes.push(format!("page tables read in part: {stop}")),
    }
    coloring.settle();
    coloring.account.free = free::judge(reader, kernel, coloring)?;
    Ok(())
}

/// What can be said of any guest on this architecture: what its processor's page tables say.
fn architecture(reader: &mut Reader, coloring: &mut Coloring, cpu: Option<Cpu>) -> Result<(), Error> {
    let Some(cpu) = cpu else {
        coloring.account.notes.push("no processor's state was given: nothing can be told".into());
        return Ok(());
    };
    reader.refill();
    coloring.account.basis = Basis::PageTables;
    coloring.account.levels = cpu.levels();
    match Mappings::new(reader.pages()).processor(reader, cpu, coloring) {
        Ok(()) => coloring.account.roots = 1,
        Err(Stop::Host(error)) => return Err(error),
        Err(stop) => coloring.account.notes.push(format!("page tables read in part: {stop}")),
    }
    coloring.settle();
    Ok(())
}
