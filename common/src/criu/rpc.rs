//! The part of CRIU's RPC that Longhaul speaks.
//!
//! Field numbers are those of CRIU 4.2, `images/rpc.proto` (MIT). Messages that pass through are never
//! decoded and encoded again: what is added to a request is appended to its bytes, because protobuf merges
//! concatenated messages (scalars: the last wins; repeated fields: all stay).

use prost::Message;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
#[allow(missing_docs, reason = "named as CRIU names them")]
pub enum RequestType {
    Empty = 0,
    Dump = 1,
    Restore = 2,
    Check = 3,
    PreDump = 4,
    PageServer = 5,
    Notify = 6,
    CpuinfoDump = 7,
    CpuinfoCheck = 8,
    FeatureCheck = 9,
    Version = 10,
}

/// `criu_req`.
#[derive(Clone, PartialEq, Message)]
pub struct Request {
    /// What it asks for.
    #[prost(enumeration = "RequestType", required, tag = "1")]
    pub kind: i32,
    /// How.
    #[prost(message, optional, tag = "2")]
    pub options: Option<Options>,
    /// The answer to a notification.
    #[prost(bool, optional, tag = "3")]
    pub notify_success: Option<bool>,
}

/// The fields of `criu_opts` that Longhaul adds to what a runtime asks for.
#[derive(Clone, PartialEq, Message)]
pub struct Options {
    /// The images, by number in the descriptor table of the socket's peer. Required by CRIU's schema.
    #[prost(int32, optional, tag = "1")]
    pub images_dir_fd: Option<i32>,
    /// Established TCP connections come along.
    #[prost(bool, optional, tag = "5")]
    pub tcp_established: Option<bool>,
    /// File locks come along.
    #[prost(bool, optional, tag = "8")]
    pub file_locks: Option<bool>,
    /// 1 errors, 2 warnings, 3 information, 4 everything.
    #[prost(int32, optional, tag = "9")]
    pub log_level: Option<i32>,
    /// The mount that becomes the container's root.
    #[prost(string, optional, tag = "13")]
    pub root: Option<String>,
    /// Where CRIU logs, by number in the descriptor table of the socket's peer.
    #[prost(int32, optional, tag = "17")]
    pub work_dir_fd: Option<i32>,
    /// An unlinked but open file with other names is kept by a temporary link.
    #[prost(bool, optional, tag = "18")]
    pub link_remap: Option<bool>,
    /// Look for a path of an inotify watch by scanning, where its handle can't be opened.
    #[prost(bool, optional, tag = "21")]
    pub force_irmap: Option<bool>,
    /// Descriptors that take the place of external files.
    #[prost(message, repeated, tag = "27")]
    pub inherit_fd: Vec<InheritFd>,
    /// How cgroups are restored.
    #[prost(enumeration = "CgroupMode", optional, tag = "34")]
    pub manage_cgroups_mode: Option<i32>,
    /// The largest unlinked file that is kept, in bytes.
    #[prost(uint32, optional, tag = "35")]
    pub ghost_limit: Option<u32>,
    /// Resources that stay outside the images.
    #[prost(string, repeated, tag = "37")]
    pub external: Vec<String>,
    /// Seconds to collect and freeze tasks.
    #[prost(uint32, optional, tag = "45")]
    pub timeout: Option<u32>,
    /// Memory is filled in after the restore.
    #[prost(bool, optional, tag = "48")]
    pub lazy_pages: Option<bool>,
    /// Who blocks packets while sockets are saved.
    #[prost(enumeration = "NetworkLock", optional, tag = "64")]
    pub network_lock: Option<i32>,
}

/// What CRIU calls a memory filesystem that comes from outside its images.
pub fn external_tmpfs(index: usize) -> String {
    format!("longhaul-tmpfs-{index}")
}

/// `inherit_fd`.
#[derive(Clone, PartialEq, Message)]
pub struct InheritFd {
    /// The external resource, e.g. `extRootNetNS` or `file[1c:2a]`.
    #[prost(string, required, tag = "1")]
    pub key: String,
    /// The descriptor in CRIU's process.
    #[prost(int32, required, tag = "2")]
    pub fd: i32,
}

/// `criu_cg_mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
#[allow(missing_docs, reason = "named as CRIU names them")]
pub enum CgroupMode {
    Ignore = 0,
    None = 1,
    Props = 2,
    Soft = 3,
    Full = 4,
    Strict = 5,
}

/// `criu_network_lock_method`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
#[allow(missing_docs, reason = "named as CRIU names them")]
pub enum NetworkLock {
    Iptables = 1,
    Nftables = 2,
    Skip = 3,
}

/// `criu_resp`.
#[derive(Clone, PartialEq, Message)]
pub struct Response {
    /// What it answers; [`RequestType::Notify`] for a notification.
    #[prost(enumeration = "RequestType", required, tag = "1")]
    pub kind: i32,
    /// Whether it was done.
    #[prost(bool, required, tag = "2")]
    pub success: bool,
    /// The notification.
    #[prost(message, optional, tag = "5")]
    pub notify: Option<Notify>,
    /// An errno, where CRIU knows one.
    #[prost(int32, optional, tag = "7")]
    pub errno: Option<i32>,
    /// CRIU's first error line.
    #[prost(string, optional, tag = "9")]
    pub errmsg: Option<String>,
    /// The answer to VERSION.
    #[prost(message, optional, tag = "10")]
    pub version: Option<Version>,
}

/// `criu_notify`.
#[derive(Clone, PartialEq, Message)]
pub struct Notify {
    /// The moment: `network-lock`, `post-dump`, `post-restore`, …
    #[prost(string, optional, tag = "1")]
    pub script: Option<String>,
    /// The root task.
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
}

/// `criu_version`.
#[derive(Clone, PartialEq, Message)]
pub struct Version {
    /// Major number.
    #[prost(int32, required, tag = "1")]
    pub major: i32,
    /// Minor number.
    #[prost(int32, required, tag = "2")]
    pub minor: i32,
    /// Sub-level.
    #[prost(int32, optional, tag = "4")]
    pub sublevel: Option<i32>,
}

/// The key under which runtimes pass a network namespace that stays outside the images.
pub const EXTERNAL_NETNS: &str = "extRootNetNS";
/// What CRIU logs: errors and warnings. Runtimes ask for everything (4), which costs milliseconds in the downtime.
pub const LOG_LEVEL: i32 = 2;
