//! Which image: `rbd:POOL/IMAGE`, in QEMU's notation (QEMU, docs/system/qemu-block-drivers.rst, "RBD").

use std::fmt;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// A path that begins like the name of an RBD image, and is none that can be used.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum NameError {
    /// No pool, or no image.
    #[error(
        "{0}: write rbd:POOL/IMAGE, rbd:POOL/NAMESPACE/IMAGE or rbd:POOL/IMAGE@SNAPSHOT; a backslash goes before each of \
         / @ : \\ that belongs to a name"
    )]
    Image(String),
    /// Something behind a colon that is no option.
    #[error(
        "{0}: {1:?} is no option; write :KEY=VALUE, for example :id=admin, :conf=/etc/ceph/ceph.conf or :mon_host=192.0.2.1"
    )]
    Option(String, String),
}

/// An image of a cluster, and how to reach it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::blk) struct Target {
    pub(super) pool: String,
    /// `None`: the pool's default one.
    pub(super) namespace: Option<String>,
    pub(super) image: String,
    pub(super) snapshot: Option<String>,
    /// Whom the cluster takes us for; `None`: `admin`.
    pub(super) id: Option<String>,
    /// Configuration file; `None`: where Ceph looks for it.
    pub(super) conf: Option<PathBuf>,
    /// Further options of Ceph's configuration.
    pub(super) options: Vec<(String, String)>,
}

impl Target {
    /// Reads a name; `None` if the path is none.
    pub(in crate::blk) fn parse(path: &Path) -> Option<Result<Self, NameError>> {
        let text = path.to_str()?;
        let rest = text.strip_prefix("rbd:")?;
        Some(Self::parse_name(text, rest))
    }

    fn parse_name(text: &str, rest: &str) -> Result<Self, NameError> {
        let (spec, mut rest) = cut(rest, ':');
        let (place, snapshot) = cut(spec, '@');
        let (pool, name) = cut(place, '/');
        let (first, second) = name.map_or(("", None), |name| cut(name, '/'));
        let (namespace, image) = match second {
            Some(image) => (Some(plain(first)), plain(image)),
            None => (None, plain(first)),
        };
        let mut target = Self {
            pool: plain(pool),
            namespace: namespace.filter(|name| !name.is_empty()),
            image,
            snapshot: snapshot.map(plain),
            id: None,
            conf: None,
            options: Vec::new(),
        };
        let nothing = |name: &String| name.is_empty() || name.contains('\0');
        let names = [Some(&target.pool), Some(&target.image)];
        let names = names.into_iter().flatten();
        if names.chain(&target.snapshot).any(nothing) {
            return Err(NameError::Image(text.to_owned()));
        }
        while let Some(options) = rest {
            let (option, more) = cut(options, ':');
            rest = more;
            let (key, value) = cut(option, '=');
            let (key, value) = (plain(key), value.map(plain).unwrap_or_default());
            if key.is_empty() || value.is_empty() || option.contains('\0') {
                return Err(NameError::Option(text.to_owned(), option.to_owned()));
            }
            match key.as_str() {
                "id" => target.id = Some(value),
                "conf" => target.conf = Some(value.into()),
                _ => target.options.push((key, value)),
            }
        }
        Ok(target)
    }
}

/// What comes before a character, and what behind it; one behind a backslash does not count.
fn cut(text: &str, at: char) -> (&str, Option<&str>) {
    let mut escaped = false;
    for (place, c) in text.char_indices() {
        if !escaped && c == at {
            let (before, behind) = text.split_at(place);
            return (before, behind.strip_prefix(at));
        }
        escaped = !escaped && c == '\\';
    }
    (text, None)
}

/// Without the backslashes.
fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => plain.extend(chars.next()),
            _ => plain.push(c),
        }
    }
    plain
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/", self.pool)?;
        if let Some(namespace) = &self.namespace {
            write!(f, "{namespace}/")?;
        }
        write!(f, "{}", self.image)?;
        match &self.snapshot {
            Some(snapshot) => write!(f, "@{snapshot}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Option<Result<Target, NameError>> {
        Target::parse(Path::new(text))
    }

    fn image(pool: &str, image: &str) -> Target {
        Target {
            pool: pool.into(),
            namespace: None,
            image: image.into(),
            snapshot: None,
            id: None,
            conf: None,
            options: Vec::new(),
        }
    }

    #[test]
    fn names_are_read_and_paths_are_left_alone() {
        assert_eq!(parse("/dev/rbd0"), None);
        assert_eq!(parse("./rbd:x"), None);
        assert_eq!(parse("rbd:p/i"), Some(Ok(image("p", "i"))));
        let full =
            parse("rbd:p/n/i@s:id=joe:conf=/a b:mon_host=[v2\\:192.0.2.1\\:3300]:rbd_cache=false");
        assert_eq!(
            full,
            Some(Ok(Target {
                namespace: Some("n".into()),
                snapshot: Some("s".into()),
                id: Some("joe".into()),
                conf: Some("/a b".into()),
                options: vec![
                    ("mon_host".into(), "[v2:192.0.2.1:3300]".into()),
                    ("rbd_cache".into(), "false".into()),
                ],
                ..image("p", "i")
            }))
        );
        assert_eq!(full.unwrap().unwrap().to_string(), "p/n/i@s");
        let odd = parse(r"rbd:a\/b/c\@d\:e\\").unwrap().unwrap();
        assert_eq!(odd, image("a/b", "c@d:e\\"));
    }

    #[test]
    fn what_is_no_image_is_refused() {
        for wrong in [
            "rbd:",
            "rbd:p",
            "rbd:p/",
            "rbd:/i",
            "rbd:p/i@",
            "rbd:p/n/",
            "rbd:p/i\0",
        ] {
            let refused = parse(wrong).unwrap();
            assert!(matches!(refused, Err(NameError::Image(_))), "{wrong}");
        }
        for wrong in [
            "rbd:p/i:",
            "rbd:p/i:id",
            "rbd:p/i:id=",
            "rbd:p/i:=x",
            "rbd:p/i:a=b:c",
        ] {
            let refused = parse(wrong).unwrap();
            assert!(matches!(refused, Err(NameError::Option(..))), "{wrong}");
        }
    }
}
