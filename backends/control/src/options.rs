//! Options of several values: `key=value,key=value`.

/// Splits `key=value,key=value`, as options have it, into keys and values; a first item without `=` is the value of the
/// `main_key`, if there is one.
///
/// # Errors
/// Fails if an item is neither, or a key is there twice; the message says which.
pub fn keys_and_values(
    text: &str,
    main_key: Option<&str>,
) -> Result<Vec<(String, String)>, String> {
    let mut pairs: Vec<(String, String)> = Vec::new();
    for item in split_items(text) {
        let (key, value) = match (item.split_once('='), main_key) {
            (Some(pair), _) => pair,
            (None, Some(key)) if pairs.is_empty() && !item.is_empty() => (key, item.as_str()),
            (None, _) => return Err(format!("`{item}` is not KEY=VALUE")),
        };
        if pairs.iter().any(|(before, _)| before == key) {
            return Err(format!("`{key}` is there twice"));
        }
        pairs.push((key.to_owned(), value.to_owned()));
    }
    Ok(pairs)
}

/// Splits at single commas; a doubled one stands for itself.
fn split_items(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c != ',' {
            if let Some(last) = items.last_mut() {
                last.push(c);
            }
        } else if chars.next_if_eq(&',').is_some() {
            if let Some(last) = items.last_mut() {
                last.push(',');
            }
        } else {
            items.push(String::new());
        }
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_have_keys_and_doubled_commas_stand_for_themselves() {
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(
            keys_and_values("01:10.0,id=a,,b", Some("host")),
            Ok(vec![pair("host", "01:10.0"), pair("id", "a,b")])
        );
        assert_eq!(
            keys_and_values("host=x=y", Some("host")),
            Ok(vec![pair("host", "x=y")])
        );
        for wrong in ["", "a,b", "a=1,", "a=1,a=2", "a,key=b"] {
            assert!(keys_and_values(wrong, Some("key")).is_err(), "{wrong}");
        }
        assert!(keys_and_values("a", None).is_err());
    }
}
