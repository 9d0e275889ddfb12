//! What servers of NBD have in common that a test is itself.

use std::io::{self, Read, Write};

/// Goes through the handshake of a server whose one export has 1 MiB (NBD, doc/proto.md, "Fixed newstyle negotiation").
pub fn greet(stream: &mut (impl Read + Write + ?Sized), structured: bool) -> io::Result<()> {
    let option_reply = |option: u32, kind: u32, data: &[u8]| {
        let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
        for word in [option, kind, data.len() as u32] {
            bytes.extend(word.to_be_bytes());
        }
        bytes.extend(data);
        bytes
    };
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    stream.read_exact(&mut [0; 4])?;
    for option in [8_u32, 7] {
        let mut head = [0; 16];
        stream.read_exact(&mut head)?;
        let len = u32::from_be_bytes(head[12..].try_into().unwrap());
        stream.read_exact(&mut vec![0; len as usize])?;
        if option == 8 {
            let kind = if structured { 1 } else { 0x8000_0001 };
            stream.write_all(&option_reply(8, kind, &[]))?;
        } else {
            // 1 MiB; flush, FUA, trim and write-zeroes.
            let info = [&[0; 2][..], &(1_u64 << 20).to_be_bytes(), &[0, 0x6d]].concat();
            stream.write_all(&option_reply(7, 3, &info))?;
            stream.write_all(&option_reply(7, 1, &[]))?;
        }
    }
    Ok(())
}
