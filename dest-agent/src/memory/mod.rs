//! A container's memory at its destination: the store it arrives in, and the filler that puts it in place.
//!
//! Pages come over the page connection ([`receive`]) into the [`store`]. When all that counts has arrived, an
//! [`index`] of every address space is written, CRIU restores the container without its pages, and the [`filler`], a
//! process of its own, answers its page faults and fills in the rest by a [`plan`]. What can't wait is put in place [at
//! once](at_once). What tasks share is in place from the beginning ([`objects`]). What the source [`owed`] when the container was
//! restored is [fetched](fetch) while it runs. What tasks share copy-on-write stays shared ([`common`]).

pub mod at_once;
pub mod channel;
pub mod common;
pub mod fetch;
pub mod filler;
pub mod handle;
pub mod index;
pub mod keeper;
pub mod objects;
pub mod owed;
pub mod plan;
pub mod receive;
pub mod store;
