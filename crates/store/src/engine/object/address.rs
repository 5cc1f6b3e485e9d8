//! Where a store on S3 is, and with what credentials it is reached.

use std::fmt;
use std::path::PathBuf;

/// A bucket, a place in it, and the server that has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) bucket: String,
    /// Without slashes at either end; may be empty.
    pub(crate) prefix: String,
    /// `http://host:port`; `None` for AWS itself.
    pub(crate) endpoint: Option<String>,
    pub(crate) region: Option<String>,
    pub(crate) profile: Option<String>,
}

impl Address {
    /// Reads `s3://bucket/prefix?endpoint=http://host:port&region=name&profile=name`.
    pub(crate) fn parse(url: &str) -> Result<Self, String> {
        let form = "an object store is written s3://bucket/prefix?endpoint=http://host:port&region=name";
        let rest = url.strip_prefix("s3://").ok_or(form)?;
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
        let fine = |text: &str, more: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c));
        if bucket.is_empty() || !fine(bucket, ".-_") {
            return Err(format!("`{bucket}` is not the name of a bucket; {form}"));
        }
        let prefix = prefix.trim_matches('/');
        let part_is_fine = |part: &str| !part.is_empty() && part != "." && part != ".." && fine(part, ".-_+@:");
        if !prefix.is_empty() && !prefix.split('/').all(part_is_fine) {
            return Err(format!("`{prefix}` cannot be a place in a bucket: use letters, digits and ._-+@: between /"));
        }
        let mut out =
            Self { bucket: bucket.to_owned(), prefix: prefix.to_owned(), endpoint: None, region: None, profile: None };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            // The value is not repeated: whoever puts credentials here must not find them in a log.
            let unknown = || {
                "after ? only endpoint, region and profile may be given; credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws/credentials".to_owned()
            };
            let (key, value) = pair.split_once('=').ok_or_else(unknown)?;
            let value = unescape(value).ok_or("a % in the address is not followed by two hexadecimal digits")?;
            match key {
                "endpoint" => {
                    let host = value.strip_prefix("http://").or_else(|| value.strip_prefix("https://"));
                    if !host.is_some_and(|host| !host.is_empty() && !host.contains('@')) {
                        return Err("the endpoint must be http://host:port or https://host:port, without credentials"
                            .to_owned());
                    }
                    out.endpoint = Some(value.trim_end_matches('/').to_owned());
                }
                "region" => out.region = Some(value),
                "profile" => out.profile = Some(value),
                _ => return Err(unknown()),
            }
        }
        Ok(out)
    }

    /// The key of an object of the store.
    pub(crate) fn key(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}/{name}", self.prefix) }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}", self.bucket)?;
        if !self.prefix.is_empty() {
            write!(f, "/{}", self.prefix)?;
        }
        self.endpoint.iter().try_for_each(|endpoint| write!(f, " at {endpoint}"))
    }
}

fn unescape(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let digit = |byte: Option<u8>| byte.and_then(|b| char::from(b).to_digit(16));
            out.push((digit(bytes.next())? << 4 | digit(bytes.next())?) as u8);
        } else {
            out.push(byte);
        }
    }
    String::from_utf8(out).ok()
}

/// What requests are signed with. Shows itself nowhere.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The public part: which key.
    pub key_id: String,
    /// The secret part.
    pub secret: String,
    /// The token that goes with temporary credentials.
    pub token: Option<String>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(hidden)")
    }
}

impl Credentials {
    /// From the environment, else from the profile in the credentials file; `env` looks up a variable. `None`
    /// where there are none.
    pub(crate) fn find(
        profile: Option<&str>,
        env: &dyn Fn(&str) -> Option<String>,
        read: &dyn Fn(PathBuf) -> Option<String>,
    ) -> Result<Option<Self>, String> {
        let set = |name: &str| env(name).filter(|value| !value.is_empty());
        if profile.is_none()
            && let (Some(key_id), Some(secret)) = (set("AWS_ACCESS_KEY_ID"), set("AWS_SECRET_ACCESS_KEY"))
        {
            return Ok(Some(Self { key_id, secret, token: set("AWS_SESSION_TOKEN") }));
        }
        let path = set("AWS_SHARED_CREDENTIALS_FILE")
            .map(PathBuf::from)
            .or_else(|| set("HOME").map(|home| PathBuf::from(home).join(".aws/credentials")));
        let named = profile.map(str::to_owned).or_else(|| set("AWS_PROFILE"));
        let wanted = named.clone().unwrap_or_else(|| "default".to_owned());
        let found = path.and_then(read).and_then(|text| Self::in_file(&text, &wanted));
        if found.is_none() && named.is_some() {
            return Err(format!("profile `{wanted}` has no complete pair of keys in the credentials file"));
        }
        Ok(found)
    }

    /// The profile in the text of a credentials file.
    fn in_file(text: &str, profile: &str) -> Option<Self> {
        let mut inside = false;
        let (mut key_id, mut secret, mut token) = (None, None, None);
        for line in text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';'])) {
            if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
                inside = name.trim() == profile;
            } else if inside && let Some((key, value)) = line.split_once('=') {
                let value = Some(value.trim().to_owned()).filter(|value| !value.is_empty());
                match key.trim() {
                    "aws_access_key_id" => key_id = value,
                    "aws_secret_access_key" => secret = value,
                    "aws_session_token" => token = value,
                    _ => {}
                }
            }
        }
        Some(Self { key_id: key_id?, secret: secret?, token })
    }

    /// `text` without anything of these credentials in it.
    pub(crate) fn hide(&self, text: &str) -> String {
        let hidden = [Some(&self.secret), Some(&self.key_id), self.token.as_ref()];
        hidden
            .into_iter()
            .flatten()
            .filter(|part| part.len() > 3)
            .fold(text.to_owned(), |text, part| text.replace(part, "***"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_as_they_are_written_and_odd_ones_are_refused() {
        let full = Address::parse("s3://bucket/a/b/?endpoint=http%3A%2F%2F127.0.0.1:8333/&region=eu-1").unwrap();
        assert_eq!(full.to_string(), "s3://bucket/a/b at http://127.0.0.1:8333");
        assert_eq!((full.key("packs/x"), full.region.as_deref()), ("a/b/packs/x".to_owned(), Some("eu-1")));
        assert_eq!(Address::parse("s3://bucket").unwrap().key("key"), "key");
        for bad in [
            "http://bucket",
            "s3://",
            "s3:///x",
            "s3://b/../c",
            "s3://b/a//c",
            "s3://b?endpoint=host",
            "s3://b?endpoint=http://user:secret@host",
            "s3://b?secret_key=hidden-value",
            "s3://b?region=%zz",
        ] {
            let error = Address::parse(bad).unwrap_err();
            assert!(!error.contains("secret@") && !error.contains("hidden-value"), "{error}");
        }
    }

    #[test]
    fn credentials_come_from_the_environment_then_the_file_and_are_never_shown() {
        let file = "[default]\naws_access_key_id = AKID1\naws_secret_access_key=secret-one\n\
                    [other]\n# note\naws_access_key_id=AKID2\naws_secret_access_key = secret/two\naws_session_token=token2\n[half]\naws_access_key_id=x\n";
        let find = |profile: Option<&str>, vars: &[(&str, &str)]| {
            let env = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
            Credentials::find(profile, &env, &|path| path.ends_with("h/.aws/credentials").then(|| file.to_owned()))
        };
        let home = ("HOME", "/h");
        let env = [home, ("AWS_ACCESS_KEY_ID", "AKENV"), ("AWS_SECRET_ACCESS_KEY", "secret-env")];
        assert_eq!(find(None, &env).unwrap().unwrap().key_id, "AKENV");
        assert_eq!(find(Some("other"), &env).unwrap().unwrap().secret, "secret/two");
        assert_eq!(find(None, &[home]).unwrap().unwrap().secret, "secret-one");
        assert_eq!(find(None, &[home, ("AWS_PROFILE", "other")]).unwrap().unwrap().token.as_deref(), Some("token2"));
        assert_eq!(find(None, &[]).unwrap(), None);
        assert!(find(Some("half"), &[home]).is_err() && find(Some("none"), &[home]).is_err());
        let found = find(Some("other"), &[home]).unwrap().unwrap();
        assert_eq!(format!("{found:?}"), "Credentials(hidden)");
        assert_eq!(found.hide("key AKID2 signs with secret/two and token2"), "key *** signs with *** and ***");
    }
}
