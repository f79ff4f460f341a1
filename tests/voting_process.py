"""50 listeners who vote at once, while pairs are made, until somebody kills the process.

Every vote is told to the standard output only after the store has acknowledged it: "LISTENER TOKEN".
"""

import sys
import threading

from stores import add_pair

from musicrl_hf.collect.desk import Desk
from musicrl_hf.collect.rules import Answer, Rules
from musicrl_hf.collect.store import VoteStore

LISTENERS = 50


def main() -> None:
    store = VoteStore(sys.argv[1], sys.argv[2] or None)
    desk = Desk(
        store, Rules(min_seconds=0, check_every=0, raters=10_000, votes_per_minute=100_000, votes_per_day=100_000)
    )
    for number in range(10):
        add_pair(store, f"prompt {number}")
    telling = threading.Lock()

    def listen() -> None:
        listener = desk.listener_of(desk.consent(desk.rules.consent_id))
        while True:
            deal = desk.deal(listener)
            if deal is None:
                continue
            assert desk.vote(listener, deal.token, Answer("a", 1.0, 1.0))
            with telling:
                print(listener, deal.token, flush=True)

    print("begins", flush=True)
    for _ in range(LISTENERS):
        threading.Thread(target=listen, daemon=True).start()
    while True:
        add_pair(store, "made meanwhile")


if __name__ == "__main__":
    main()
