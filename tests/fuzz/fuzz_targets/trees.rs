#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| longhaul_lab::fuzz::trees(bytes));
