//! Options of several values: `key=value,key=value`.

/// Splits `key=value,key=value`, as options have it, into keys and values; a first item without `=` is the value of `main_key`.
///
/// # Errors
/// Fails if an item is neither; the message says which.
pub fn keys_and_values(text: &str, main_key: &str) -> Result<Vec<(String, String)>, String> {
    let mut pairs = Vec::new();
    for (i, item) in split_items(text).into_iter().enumerate() {
        match item.split_once('=') {
            Some((key, value)) => pairs.push((key.to_owned(), value.to_owned())),
            None if i == 0 && !item.is_empty() => pairs.push((main_key.to_owned(), item)),
            None => return Err(format!("`{item}` is not KEY=VALUE")),
        }
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
            keys_and_values("01:10.0,id=a,,b", "host"),
            Ok(vec![pair("host", "01:10.0"), pair("id", "a,b")])
        );
        assert_eq!(
            keys_and_values("host=x=y", "host"),
            Ok(vec![pair("host", "x=y")])
        );
        for wrong in ["", "a,b", "a=1,"] {
            assert!(keys_and_values(wrong, "key").is_err(), "{wrong}");
        }
    }
}
