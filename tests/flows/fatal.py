"""A handler with an order that ends its process, as one that needs too much memory does."""

import os
import signal

from adapter.plugin import Context, Done, NoSettings, Notification, NotificationHandler

FATAL = "fatal"


class Fatal(NotificationHandler[NoSettings]):
    """Kills its process for one order, and has every other order at once."""

    repeatable = True

    async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done:
        if notification.order.id == FATAL:
            os.kill(os.getpid(), signal.SIGKILL)
        return Done()
