//! Spilled registers in the compiler's log.

/// The main kernels that keep something in memory that belongs into registers: nothing else would tell
/// that one has become slow. A test refuses them.
pub fn spills(log: &str) -> Result<Vec<String>, String> {
    let (mut kernel, mut num_kernels, mut spills) = ("?", 0, Vec::new());
    for line in log.lines() {
        if let Some((_, name)) = line.split_once("Function properties for ") {
            kernel = name;
        }
        if line.contains("bytes stack frame") {
            num_kernels += 1;
            let words = line.split_whitespace();
            let numbers = words.filter_map(|word| word.parse::<u64>().ok());
            if numbers.sum::<u64>() > 0 {
                let line = line.trim_start_matches("ptxas").trim_matches([' ', '.']);
                spills.push(format!("{kernel} has {line}"));
            }
        }
    }
    if num_kernels == 0 {
        return Err(format!("the compiler does not tell of spills: {log}"));
    }
    Ok(spills)
}
