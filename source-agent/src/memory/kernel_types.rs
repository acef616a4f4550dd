//! The kernel's own types (Documentation/bpf/btf.rst): ids of functions and places of members, which differ between kernels.
//!
//! Only that: the crates for it read all 100,000 types of a kernel into memory, or need a compiled program.

use std::ops::Range;

/// Kinds of types (`BTF_KIND_*`, linux/btf.h).
mod kind {
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const FUNC: u32 = 12;
}

/// `struct btf_type`: name, information, and a size or another type.
const TYPE: usize = 12;
/// `struct btf_member`: name, type, offset in bits.
const MEMBER: usize = 12;
/// Anonymous parts within anonymous parts that are looked into.
const DEPTH: u32 = 8;

/// All types of a kernel.
pub(crate) struct Types {
    bytes: Vec<u8>,
    names: Range<usize>,
    /// Where each one is, by its id; 0 is no type.
    places: Vec<usize>,
}

impl Types {
    /// Those of the kernel that runs. They are megabytes, and wanted once or twice in an agent's life.
    pub(crate) fn of_this_host() -> Option<Self> {
        Self::parse(std::fs::read("/sys/kernel/btf/vmlinux").ok()?)
    }

    /// From `/sys/kernel/btf/vmlinux`. Nothing, if it has a kind of type that isn't known here.
    pub(super) fn parse(bytes: Vec<u8>) -> Option<Self> {
        let header = |at: usize| usize::try_from(word(&bytes, at)?).ok();
        if bytes.get(..2)? != 0xeb9f_u16.to_le_bytes() {
            return None;
        }
        let body = header(4)?;
        let (mut at, end) = (body + header(8)?, body + header(8)? + header(12)?);
        let names = body + header(16)?..body + header(16)? + header(20)?;
        let mut places = vec![0];
        while at < end {
            places.push(at);
            at += TYPE + trailing(word(&bytes, at + 4)?)?;
        }
        Some(Self { bytes, names, places })
    }

    /// The id of a function.
    pub(super) fn function(&self, name: &str) -> Option<u32> {
        u32::try_from(self.find(kind::FUNC, name)?).ok()
    }

    /// Where a member of a structure is, in bytes.
    pub(crate) fn member(&self, structure: &str, member: &str) -> Option<i16> {
        i16::try_from(self.offset(self.find(kind::STRUCT, structure)?, member, DEPTH)? / 8).ok()
    }

    fn find(&self, kind: u32, name: &str) -> Option<usize> {
        let is_it = |&id: &usize| {
            let place = self.places[id];
            word(&self.bytes, place + 4).map(kind_of) == Some(kind) && self.name(place) == Some(name.as_bytes())
        };
        (1..self.places.len()).find(is_it)
    }

    /// In bits.
    fn offset(&self, id: usize, wanted: &str, depth: u32) -> Option<u32> {
        let place = *self.places.get(id)?;
        let info = word(&self.bytes, place + 4)?;
        if depth == 0 || !matches!(kind_of(info), kind::STRUCT | kind::UNION) {
            return None;
        }
        for index in 0..(info & 0xffff) as usize {
            let member = place + TYPE + index * MEMBER;
            // With the flag, the upper bits are a bit field's width.
            let offset = word(&self.bytes, member + 8)? & if info >> 31 == 1 { 0x00ff_ffff } else { u32::MAX };
            match self.name(member)? {
                b"" => {
                    let inner = self.offset(word(&self.bytes, member + 4)? as usize, wanted, depth - 1);
                    if let Some(inner) = inner {
                        return Some(offset + inner);
                    }
                }
                name if name == wanted.as_bytes() => return Some(offset),
                _ => {}
            }
        }
        None
    }

    /// The name whose offset stands at a place.
    fn name(&self, place: usize) -> Option<&[u8]> {
        let names = self.bytes.get(self.names.clone())?;
        names.get(word(&self.bytes, place)? as usize..)?.split(|&byte| byte == 0).next()
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn kind_of(info: u32) -> u32 {
    (info >> 24) & 0x1f
}

/// The bytes that follow a `struct btf_type`.
fn trailing(info: u32) -> Option<usize> {
    let count = (info & 0xffff) as usize;
    Some(match kind_of(info) {
        // INT, VAR, DECL_TAG.
        1 | 14 | 17 => 4,
        // PTR, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FLOAT, TYPE_TAG.
        2 | 7..=12 | 16 | 18 => 0,
        // ARRAY.
        3 => 12,
        // STRUCT, UNION, DATASEC, ENUM64.
        4 | 5 | 15 | 19 => count * 12,
        // ENUM, FUNC_PROTO.
        6 | 13 => count * 8,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_and_members_are_found() {
        // struct outer { int first; union { long inner; }; } and a function of the same name.
        let names = b"\0outer\0first\0inner\0";
        let types: [u32; 19] = [
            1,
            kind::STRUCT << 24 | 2,
            16,
            /* first */ 7,
            0,
            0,
            /* the union */ 0,
            2,
            64, //
            0,
            kind::UNION << 24 | 1,
            8,
            /* inner */ 13,
            0,
            0, //
            1,
            kind::FUNC << 24,
            0,
            0,
        ];
        // The last word is not part of it.
        let types: Vec<u8> = types[..18].iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        let header = [24u32, 0, types.len() as u32, types.len() as u32, names.len() as u32];
        bytes.extend(header.iter().flat_map(|word| word.to_le_bytes()));
        bytes.extend(&types);
        bytes.extend(names);
        let read = Types::parse(bytes.clone()).expect("reads");
        assert_eq!(read.function("outer"), Some(3));
        assert_eq!(read.function("first"), None);
        assert_eq!((read.member("outer", "first"), read.member("outer", "inner")), (Some(0), Some(8)));
        assert_eq!(read.member("outer", "other"), None);
        for length in 0..bytes.len() {
            // Cut off anywhere, nothing is found that isn't there.
            let read = Types::parse(bytes[..length].to_vec());
            assert!(read.is_none_or(|read| read.function("inner").is_none()));
        }
    }
}
