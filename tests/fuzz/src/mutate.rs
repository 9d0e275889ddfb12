//! Other inputs, made of those that are kept. No guidance, but always the same ones, and on any toolchain.

/// Longest input.
const LONGEST: usize = 4096;
/// Bytes that mean something in many places.
const TELLING: [u8; 8] = [0, 1, 2, 0x7f, 0x80, 0xfe, 0xff, 0x10];

/// A row of inputs, each made of one or two seeds.
#[derive(Debug)]
pub struct Mutations<'a> {
    seeds: &'a [Vec<u8>],
    state: u64,
}

impl<'a> Mutations<'a> {
    /// The row that begins with this number, which is not 0.
    #[must_use]
    pub const fn new(seeds: &'a [Vec<u8>], start: u64) -> Self {
        Self {
            seeds,
            state: start,
        }
    }

    /// xorshift64
    fn below(&mut self, limit: usize) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        // Not 0 for what is empty.
        (self.state >> 16) as usize % limit.max(1)
    }

    fn seed(&mut self) -> &'a [u8] {
        match self.seeds.len() {
            0 => &[],
            count => &self.seeds[self.below(count)],
        }
    }

    fn part(&mut self, of: &[u8]) -> Vec<u8> {
        let start = self.below(of.len());
        let len = self.below(of.len() - start + 1);
        of[start..start + len].to_vec()
    }

    fn change(&mut self, input: &mut Vec<u8>) {
        let at = self.below(input.len());
        match self.below(8) {
            0 if !input.is_empty() => input[at] ^= 1 << self.below(8),
            1 if !input.is_empty() => input[at] = TELLING[self.below(8)],
            2 if !input.is_empty() => input[at] = self.below(256) as u8,
            3 => {
                let len = self.below(16);
                let noise = (0..len).map(|_| self.below(256) as u8).collect::<Vec<_>>();
                input.splice(at..at, noise);
            }
            4 => {
                let end = at + self.below(input.len() - at + 1).min(16);
                input.drain(at..end);
            }
            5 => {
                let own = input.clone();
                let part = self.part(&own);
                input.splice(at..at, part);
            }
            6 => {
                let other = self.seed();
                let part = self.part(other);
                input.splice(at..at, part);
            }
            _ => {
                let part = self.part(self.seeds.first().map_or(&[], Vec::as_slice));
                let end = (at + part.len()).min(input.len());
                input.splice(at..end, part);
            }
        }
    }
}

impl Iterator for Mutations<'_> {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        let mut input = self.seed().to_vec();
        for _ in 0..=self.below(8) {
            self.change(&mut input);
        }
        input.truncate(LONGEST);
        Some(input)
    }
}
