//! The private authority: two commands make everything mutual TLS needs.
//!
//! `migrate pki init` makes the authority on one host; `migrate pki issue HOST` makes a directory with a
//! host's `ca.pem`, `cert.pem` and `key.pem`, to be copied to that host's `/etc/longhaul/tls`.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use thiserror::Error;
use time::{Duration, OffsetDateTime};

/// Where the authority is kept unless told otherwise.
pub const DEFAULT_DIR: &str = "/etc/longhaul/pki";
/// How long an authority is valid.
const AUTHORITY_DAYS: i64 = 3650;
/// How long a host's certificate is valid, unless told otherwise, in days.
pub const HOST_DAYS: i64 = 825;

/// A failure to make an authority or a certificate.
#[derive(Debug, Error)]
pub enum PkiError {
    /// A file or directory.
    #[error("can't {operation} {path}")]
    File {
        /// `read`, `write`, `create`.
        operation: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// There is an authority already.
    #[error("there is an authority in {0} already: issue from it, or move it away first")]
    Exists(PathBuf),
    /// There is none.
    #[error("there is no authority in {0}: `migrate pki init` makes one")]
    Missing(PathBuf),
    /// The name can't be in a certificate or a path.
    #[error("{0:?} is no host name: letters, digits, dots and hyphens are allowed")]
    Name(String),
    /// The library refused.
    #[error("can't make the certificate")]
    Make(#[from] rcgen::Error),
}

/// Makes an authority in `dir`.
pub fn init(dir: &Path) -> Result<(), PkiError> {
    if dir.join("ca-key.pem").exists() {
        return Err(PkiError::Exists(dir.to_owned()));
    }
    create_private_dir(dir)?;
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = name("Longhaul private authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    validity(&mut params, AUTHORITY_DAYS);
    let certificate = params.self_signed(&key)?;
    write(&dir.join("ca.pem"), certificate.pem().as_bytes(), 0o644)?;
    write(&dir.join("ca-key.pem"), key.serialize_pem().as_bytes(), 0o600)
}

/// Makes `dir/hosts/HOST` with the host's files and returns that directory. `names` are further DNS names and
/// addresses of the host.
pub fn issue(dir: &Path, host: &str, names: &[String], days: i64) -> Result<PathBuf, PkiError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-');
    for name in names.iter().map(String::as_str).chain([host]) {
        let address = name.parse::<std::net::IpAddr>().is_ok() && name != host;
        if name.is_empty() || name.starts_with('.') || !(address || name.chars().all(plain)) {
            return Err(PkiError::Name(name.to_owned()));
        }
    }
    let (authority, authority_key) = (dir.join("ca.pem"), dir.join("ca-key.pem"));
    if !authority_key.exists() {
        return Err(PkiError::Missing(dir.to_owned()));
    }
    let authority_pem = read(&authority)?;
    let issuer = Issuer::from_ca_cert_pem(&authority_pem, KeyPair::from_pem(&read(&authority_key)?)?)?;
    let mut all = vec![host.to_owned()];
    all.extend(names.iter().cloned());
    let mut params = CertificateParams::new(all)?;
    params.distinguished_name = name(host);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // Every host is a client of some migrations and the server of others.
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    validity(&mut params, days);
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &issuer)?;

    let out = dir.join("hosts").join(host);
    create_private_dir(&out)?;
    write(&out.join("ca.pem"), authority_pem.as_bytes(), 0o644)?;
    write(&out.join("cert.pem"), certificate.pem().as_bytes(), 0o644)?;
    write(&out.join("key.pem"), key.serialize_pem().as_bytes(), 0o600)?;
    Ok(out)
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common);
    name
}

/// From an hour ago, since two hosts' clocks differ, for `days` days. A negative number makes an expired one.
fn validity(params: &mut CertificateParams, days: i64) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - Duration::hours(1) + Duration::days(days.min(0) * 2);
    params.not_after = now + Duration::days(days);
}

fn create_private_dir(dir: &Path) -> Result<(), PkiError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|source| PkiError::File {
        operation: "create",
        path: dir.to_owned(),
        source,
    })
}

fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| PkiError::File { operation: "read", path: path.to_owned(), source })
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), PkiError> {
    let wrap = |source| PkiError::File { operation: "write", path: path.to_owned(), source };
    // Removed first: a key must never be readable by more than its mode says, not even for a moment.
    let _ = fs::remove_file(path);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(wrap)?;
    file.write_all(bytes).map_err(wrap)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TlsFiles;
    use crate::tls::Identity;

    #[test]
    fn two_commands_make_an_identity_that_loads() {
        let dir = tempfile::tempdir().expect("a directory");
        init(dir.path()).expect("an authority");
        let host = issue(dir.path(), "host1", &["10.0.0.1".into()], HOST_DAYS).expect("a certificate");
        let files = TlsFiles { ca: host.join("ca.pem"), cert: host.join("cert.pem"), key: host.join("key.pem") };
        Identity::load(&files).expect("loads");
        assert!(matches!(init(dir.path()), Err(PkiError::Exists(_))));
    }

    #[test]
    fn a_name_that_is_a_path_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        init(dir.path()).expect("an authority");
        for bad in ["", "../x", "a/b", ".."] {
            assert!(matches!(issue(dir.path(), bad, &[], 1), Err(PkiError::Name(_))), "{bad}");
        }
    }
}
