//! The agent as a process: what it takes while nothing happens, and the programs
//! that it stands beside.

mod budget;
mod claims;
mod limits;
mod one_shot;
