//! A lock-free stack (Treiber) that is emptied all at once: any thread pushes one value, or takes
//! all of them.

use std::ptr;

use dirtymap::sync::{AtomicPtr, Ordering, Step, Witness, weaken};

/// See the [module](self).
pub(crate) struct Stack<T> {
    /// The newest node; null if there are none.
    top: AtomicPtr<Node<T>>,
}

struct Node<T> {
    value: T,
    next: *mut Node<T>,
    witness: Witness,
}

impl<T> Stack<T> {
    pub(crate) fn new() -> Self {
        Stack {
            top: AtomicPtr::new(ptr::null_mut()),
        }
    }

    pub(crate) fn push(&self, value: T) {
        let node = Box::into_raw(Box::new(Node {
            value,
            next: ptr::null_mut(),
            witness: Witness::new(),
        }));
        // Relaxed: we only link to the old top; the thread that takes the stack reads the nodes.
        let mut top = self.top.load(Ordering::Relaxed);
        loop {
            // SAFETY: `node` came from `Box::into_raw` above and is not published yet, so it is
            // ours alone.
            unsafe { (*node).next = top };
            // Release on success: publishes the node, and all that we did before; pairs with the
            // Acquire in `take`. The nodes below were published by their own pushes, whose release
            // sequences this one continues. Relaxed on failure: as the load above. ABA is harmless:
            // we link to the top, whichever node it is, and never look into it.
            match self.top.compare_exchange_weak(
                top,
                node,
                weaken(Step::PublishRequest, Ordering::Release),
                Ordering::Relaxed,
            ) {
                Ok(_) => return,
                Err(now) => top = now,
            }
        }
    }

    /// Whether the stack is empty. Relaxed: a push that must be seen here is ordered by other
    /// means.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        // Relaxed: as said above; `take` acquires.
        self.top.load(Ordering::Relaxed).is_null()
    }

    /// Takes everything, the newest first.
    pub(crate) fn take(&self) -> Taken<T> {
        // Acquire: pairs with the Release of every push below the top; publishes the nodes, and the
        // changes that came before the pushes.
        Taken(self.top.swap(ptr::null_mut(), Ordering::Acquire))
    }
}

impl<T> Drop for Stack<T> {
    fn drop(&mut self) {
        drop(self.take());
    }
}

// SAFETY: `top` leads to nodes that belong to the thread that swaps the pointer out: they move
// between threads, and are not shared.
unsafe impl<T: Send> Send for Stack<T> {}
// SAFETY: as for `Send`; shared access is by atomic operations only, and hands values over, never
// references.
unsafe impl<T: Send> Sync for Stack<T> {}

/// The values that were taken, the newest first. Values that are not iterated over are dropped.
pub(crate) struct Taken<T>(*mut Node<T>);

impl<T> Iterator for Taken<T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        if self.0.is_null() {
            return None;
        }
        // SAFETY: made by `Box::into_raw` in `push`; the swap in `take` made the whole stack ours,
        // and each node is taken once.
        let node = *unsafe { Box::from_raw(self.0) };
        node.witness.end();
        self.0 = node.next;
        Some(node.value)
    }
}

impl<T> Drop for Taken<T> {
    fn drop(&mut self) {
        self.for_each(drop);
    }
}
