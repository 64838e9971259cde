//! Asks at the terminal for what is not to be seen there.

use std::fs::File;
use std::io;

use anyhow::{Context, bail};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use tokio::sync::oneshot;

use super::run::stop_signal;
use super::{FAILED, small_runtime};

const ASKING: &str = "asking for the password";
const INTERRUPTED: &str = "interrupted; nothing was changed";

/// What is typed after `prompt`. A signal that ends the program, such as Ctrl-C's, leaves the terminal
/// as it was before: it goes on showing what is typed.
pub(super) fn hidden(prompt: String) -> anyhow::Result<String> {
    let terminal = File::open("/dev/tty").context(ASKING)?;
    let before = tcgetattr(&terminal).context(ASKING)?;
    small_runtime()?.block_on(async {
        // It takes Ctrl-C from now on, which otherwise ends the program on the spot.
        let stop = stop_signal()?;
        let (tell, answer) = oneshot::channel();
        // A thread that the runtime does not wait for: nothing but a line ends it.
        std::thread::spawn(move || {
            // Nobody listens any more after a signal.
            let _ = tell.send(rpassword::prompt_password(prompt));
        });
        tokio::select! {
            answer = answer => match answer? {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => bail!(INTERRUPTED),
                answer => answer.context(ASKING),
            },
            () = stop => {
                tcsetattr(&terminal, OptionalActions::Now, &before).context(ASKING)?;
                bail!(INTERRUPTED)
            }
        }
    })
}

/// Signals end the program again after the last question: tokio goes on taking them.
pub(super) fn done() -> anyhow::Result<()> {
    let runtime = small_runtime()?;
    let stop = runtime.block_on(async { stop_signal() })?;
    std::thread::spawn(move || {
        runtime.block_on(stop);
        std::process::exit(FAILED.into());
    });
    Ok(())
}
