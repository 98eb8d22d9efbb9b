//! Futures for tasks, in one form: tokio takes some 3 KB of the program for each type of future that
//! is spawned, and the same again for its other scheduler.

use futures_util::future::BoxFuture;

pub fn boxed<T>(future: impl Future<Output = T> + Send + 'static) -> BoxFuture<'static, T> {
    Box::pin(future)
}

/// For hyper, which spawns connections and the requests on them.
#[derive(Clone, Copy)]
pub struct Executor;

impl<F: Future<Output: Send> + Send + 'static> hyper::rt::Executor<F> for Executor {
    fn execute(&self, future: F) {
        tokio::spawn(boxed(async move {
            future.await;
        }));
    }
}
