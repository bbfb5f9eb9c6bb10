//! Thrift's compact protocol, as far as it takes to refuse what would keep its readers busy for hours.
//!
//! The Parquet crate passes over a field that it does not know element by element. Booleans of a list or a map
//! take no bytes there, so that six bytes of a damaged file can say "two thousand million of them", any number
//! of times.

use std::io::{self, Read};

/// Elements without bytes of their own that one struct may hold.
const MOST_WITHOUT_BYTES: u64 = 1 << 20;
/// The deepest nesting that is followed; the Parquet crate refuses it earlier.
const DEEPEST: usize = 100;

const STRUCT: u8 = 12;

/// Why a walk has ended early.
enum End {
    /// Not Thrift, or cut short: for the real reader to say.
    Malformed,
    Endless,
}

/// Whether the struct that begins here holds more elements than anybody can mean.
pub(crate) fn is_endless(reader: impl Read) -> bool {
    let mut walk = Walk {
        reader,
        without_bytes: 0,
    };
    matches!(walk.skip(STRUCT, DEEPEST), Err(End::Endless))
}

struct Walk<R> {
    reader: R,
    without_bytes: u64,
}

impl<R: Read> Walk<R> {
    fn skip(&mut self, kind: u8, depth: usize) -> Result<(), End> {
        let depth = depth.checked_sub(1).ok_or(End::Malformed)?;
        match kind {
            1 | 2 => Ok(()),
            3 => self.byte().map(drop),
            4..=6 => self.varint().map(drop),
            7 => self.bytes(8),
            8 => self.varint().and_then(|length| self.bytes(length)),
            9 | 10 => {
                let head = self.byte()?;
                let size = match head >> 4 {
                    15 => self.varint()?,
                    size => u64::from(size),
                };
                self.elements(&[head & 15], size, depth)
            }
            11 => match self.varint()? {
                0 => Ok(()),
                size => {
                    let kinds = self.byte()?;
                    self.elements(&[kinds >> 4, kinds & 15], size, depth)
                }
            },
            STRUCT => self.fields(depth),
            13 => self.bytes(16),
            _ => Err(End::Malformed),
        }
    }

    fn elements(&mut self, kinds: &[u8], size: u64, depth: usize) -> Result<(), End> {
        if kinds.iter().all(|kind| matches!(kind, 1 | 2)) {
            self.without_bytes = self.without_bytes.saturating_add(size);
            return match self.without_bytes > MOST_WITHOUT_BYTES {
                true => Err(End::Endless),
                false => Ok(()),
            };
        }
        for _ in 0..size {
            for &kind in kinds {
                self.skip(kind, depth)?;
            }
        }
        Ok(())
    }

    fn fields(&mut self, depth: usize) -> Result<(), End> {
        loop {
            let head = self.byte()?;
            if head & 15 == 0 {
                return Ok(());
            }
            // Without a step from the field before, its number follows.
            if head >> 4 == 0 {
                self.varint()?;
            }
            self.skip(head & 15, depth)?;
        }
    }

    fn byte(&mut self) -> Result<u8, End> {
        let mut byte = [0];
        self.reader
            .read_exact(&mut byte)
            .map_err(|_| End::Malformed)?;
        Ok(byte[0])
    }

    fn varint(&mut self) -> Result<u64, End> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(End::Malformed)
    }

    fn bytes(&mut self, count: u64) -> Result<(), End> {
        let passed = io::copy(&mut (&mut self.reader).take(count), &mut io::sink());
        match passed {
            Ok(passed) if passed == count => Ok(()),
            _ => Err(End::Malformed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_without_bytes_are_counted_and_others_end_with_their_bytes() {
        let endless = |bytes: &[u8]| is_endless(bytes);
        // Field 1, a list of 2 147 483 647 booleans; the same in a map, in a struct, in a list of lists.
        assert!(endless(&[0x19, 0xf1, 0xff, 0xff, 0xff, 0xff, 0x07, 0]));
        assert!(endless(&[0x1b, 0xff, 0xff, 0xff, 0xff, 0x07, 0x12, 0]));
        assert!(endless(&[
            0x15, 4, 0x1c, 0x19, 0xf2, 0xff, 0xff, 0xff, 0xff, 0x07
        ]));
        assert!(endless(&[
            0x19, 0x29, 0x01, 0xf1, 0xff, 0xff, 0xff, 0xff, 0x07
        ]));
        // Many that are small one by one.
        let list = [0x19, 0xf1, 0x80, 0x80, 0x20];
        assert!(!endless(&[&list[..], &[0]].concat()));
        assert!(endless(&[list, list, list].concat()));
        // As long, but each element has a byte to be missed.
        assert!(!endless(&[0x19, 0xf3, 0xff, 0xff, 0xff, 0xff, 0x07, 0]));
        assert!(!endless(&[0x18, 0xff, 0xff, 0xff, 0xff, 0x07, 0]));
        assert!(!endless(&[0x19; 1000]));
        assert!(!endless(&[]));
    }
}
