//! The seam to CRIU: its RPC, and the hold that keeps it waiting at the two moments that matter.

pub mod hold;
pub mod rpc;
