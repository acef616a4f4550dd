//! Says which side of a failed handshake refused the other, and why.

use std::error::Error;

use rustls::{AlertDescription, CertificateError};

/// Looks through an error and its sources for a TLS refusal; nothing if there is none.
pub fn explain(error: &(dyn Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(tls) = tls_error(error) {
            return Some(describe(tls));
        }
        if let Some(alert) = alert_in(&error.to_string()) {
            return Some(describe(&rustls::Error::AlertReceived(alert)));
        }
        next = error.source();
    }
    None
}

/// An alert by the text that rustls makes of it: h2 keeps the text of an error alone.
fn alert_in(text: &str) -> Option<AlertDescription> {
    let (_, name) = text.split_once("received fatal alert: ")?;
    let known = [
        AlertDescription::CertificateRequired,
        AlertDescription::CertificateExpired,
        AlertDescription::CertificateUnknown,
        AlertDescription::BadCertificate,
        AlertDescription::UnknownCA,
        AlertDescription::DecryptError,
        AlertDescription::AccessDenied,
    ];
    known.into_iter().find(|alert| name.starts_with(&format!("{alert:?}")))
}

fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    if let Some(tls) = error.downcast_ref::<rustls::Error>() {
        return Some(tls);
    }
    // An io::Error's source() skips the error it wraps.
    let inner = error.downcast_ref::<std::io::Error>()?.get_ref()?;
    tls_error(inner)
}

fn describe(error: &rustls::Error) -> String {
    use rustls::Error as Tls;
    match error {
        Tls::AlertReceived(alert) => match alert {
            AlertDescription::CertificateRequired => {
                "it refused us: we presented no certificate. Give this agent one: `migrate pki issue`".to_owned()
            }
            AlertDescription::CertificateExpired => {
                "it refused our certificate: it has expired. Issue a new one: `migrate pki issue`".to_owned()
            }
            AlertDescription::UnknownCA | AlertDescription::DecryptError => {
                "it refused our certificate: another authority signed it. Both hosts need certificates of the same \
                 authority (`migrate pki issue`)"
                    .to_owned()
            }
            other => format!("it refused our certificate ({other:?})"),
        },
        Tls::NoCertificatesPresented => "it presented no certificate".to_owned(),
        Tls::InvalidCertificate(reason) => match reason {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "its certificate has expired. Issue a new one: `migrate pki issue`".to_owned()
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "its certificate is not valid yet: compare the two hosts' clocks".to_owned()
            }
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "its certificate was signed by another authority. Both hosts need certificates of the same authority \
                 (`migrate pki issue`)"
                    .to_owned()
            }
            CertificateError::NotValidForName => "its certificate is for another name".to_owned(),
            CertificateError::NotValidForNameContext { expected, presented } => format!(
                "its certificate is for {}, not for {}: set `name` in its [hosts] entry, or issue one for that name",
                presented.join(", "),
                expected.to_str()
            ),
            other => format!("its certificate is not valid ({other})"),
        },
        other => format!("the TLS handshake failed: {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_found_inside_an_io_error() {
        let tls = rustls::Error::AlertReceived(AlertDescription::CertificateExpired);
        let io = std::io::Error::new(std::io::ErrorKind::InvalidData, tls);
        assert!(explain(&io).expect("found").contains("expired"));
        let told = std::io::Error::other("connection error: received fatal alert: UnknownCA");
        assert!(explain(&told).expect("found").contains("another authority"));
        assert_eq!(explain(&std::io::Error::other("plain")), None);
    }
}
