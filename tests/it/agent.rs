//! The agent as a process: the programs that it stands beside, what uses up a
//! claim, and limits that outlive it.

mod claims;
mod confirm;
mod limits;
mod no_sock_diag;
mod one_shot;
mod withdrawal;
mod workload_api;
mod workload_client;
