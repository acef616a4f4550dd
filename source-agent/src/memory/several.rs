//! Work on several tasks at a time: a frozen container waits for nothing else.

use std::sync::atomic::{AtomicUsize, Ordering};

/// What becomes of each, in their order, by as many threads as there are processors; or the first failure that one of these meets.
pub(super) fn of_each<T: Sync, R: Send, E: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    let workers = std::thread::available_parallelism().map_or(1, |count| count.get()).min(items.len());
    let next = AtomicUsize::new(0);
    let share = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return Ok::<_, E>(done) };
            done.push((index, work(item)?));
        }
    };
    let mut done = std::thread::scope(|scope| {
        let others: Vec<_> = (1..workers).map(|_| scope.spawn(share)).collect();
        let mut done = share()?;
        for other in others {
            done.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(done)
    })?;
    done.sort_unstable_by_key(|(index, _)| *index);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_done_once_and_in_order() {
        let items: Vec<u32> = (0..100).collect();
        assert_eq!(of_each(&items, |item| Ok::<_, ()>(item * 2)), Ok(items.iter().map(|item| item * 2).collect()));
        assert_eq!(of_each(&items, |item| if *item == 50 { Err("fifty") } else { Ok(()) }), Err("fifty"));
        assert_eq!(of_each(&[], |_: &u32| Ok::<u32, ()>(1)), Ok(Vec::new()));
    }
}
