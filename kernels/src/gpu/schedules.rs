//! The schedules of the calls on NVIDIA GPUs: which launches make up a call.

pub mod collapse;
pub mod head;
pub mod norm;
pub mod one_pass;
pub mod post;
pub mod post_pre;
pub mod pre;
pub mod projection;
pub mod sinkhorn;
pub mod sizes;
