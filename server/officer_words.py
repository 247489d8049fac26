"""What the officer's report says in the same words each time. No figure stands here."""

AGAINST = (
    "the coordinator, who sees every update of every site",
    "the other sites, and whoever reads the network",
    "whoever holds the finished model, or every model there was on the way",
)
"""Whom the guarantee holds against."""
NOT_AGAINST = (
    "the site's own staff, programs and machines: they have the records themselves",
    "whoever takes over the site's machine while it trains",
)

WATCHED = (
    (
        "amount of noise",
        "that the noise added in each step has the size that the plan promises, no less and no "
        "more",
        ("noise-scale",),
    ),
    (
        "fresh noise",
        "that no noise is used twice, and that its parts do not depend on each other",
        ("noise-correlation", "noise-reuse"),
    ),
    (
        "random choice of records",
        "that each step draws every record by a coin of its own, at the promised rate",
        (
            "sampler-rate",
            "sampler-dispersion",
            "sampler-overlap",
            "sampler-passes",
            "sampler-repeat",
        ),
    ),
    (
        "limit on each record's say",
        "that no record moves a step by more than the fixed bound (the clip bound)",
        ("clip-bound",),
    ),
    (
        "nothing released beside it",
        "that exactly the numbers that were trained with noise are released, and no others",
        ("optimizer-coverage",),
    ),
    (
        "number of steps",
        "that as many steps were taken as were paid for, also those that drew nothing",
        ("step-count",),
    ),
)
"""What a site's program measures in every step: name, what is looked at, and which of the checks of
`common.privacy.watched` that is."""
WATCHED_RULE = (
    "A round in which one of these is off is not released: it is lost, stays paid for, and is "
    "counted as lost. The measurements themselves stay at the site, because they could tell of "
    "records."
)

AUDITS = {
    "mechanism": "the training step alone, on made-up records that are easy to recognise; that "
    "records are drawn by chance is not tested",
    "run": "a whole run, with made-up records that are easy to recognise beside the real ones",
    "mia": "the finished model: which records it was trained on, guessed from how well they fit",
}
"""What an audit attacked, by the first word of its design."""
OTHER_AUDIT = "of a kind that this report has no words for; its design is in the JSON"

UNCHARGED = (
    (
        "that the site takes part, when it answers and how long it takes",
        "seen by the coordinator and the network",
    ),
    (
        "the state of the books: last entry's fingerprint, cap, what was paid for",
        "depends on plans and past rounds, not on records",
    ),
    (
        "one of a fixed list of reasons for not answering",
        "names no record; a fault while a record is handled would show as 'local failure'",
    ),
    (
        "what the choice of settings reveals",
        "if settings were chosen by looking at earlier runs on these records, that is outside the "
        "bound",
    ),
)
"""What leaves every site without a charge, and why."""
UNCHARGED_UNKNOWN = (
    "the number of records, where it was counted and not declared",
    "no run was given with this report; the run's own report says which it was",
)
UNCHARGED_RECORDS = (
    "the number of records",
    "it was counted, not declared: what the update is divided by follows from it, and is outside "
    "the bound",
)
UNCHARGED_LEFT_OUT = (
    "how well the model does at the site that was left out",
    "measured on that site's records without any protection, in a simulation",
)

NOT_COVERED = (
    "The same person at two sites, or under two names: the bounds add up.",
    "The same records in another ledger, under another key or in other words: no ledger can show "
    "it. That each set of records has one ledger is for you to enrol.",
    "That the site runs the program it says it runs. The books are the site's own account; an "
    "audit tests that account, and cannot prove it.",
    "Where the noise came from: books hold how much was promised. A site refuses instructions with "
    "predictable noise unless it was started for a demonstration.",
    "What people learn from the model that is true of everybody: the guarantee is about one "
    "record's being there, not about facts that hold without it.",
    "Times in the books are the site's own clock; nothing rests on them.",
)
NOT_COVERED_RECORD = (
    "A person with several records: the bound is for one record. For two records of one person at "
    "a site the table says what it is."
)
NOT_COVERED_SIMULATION = (
    "Separate sites: this was a simulation, in which one machine held the records, books and keys "
    "of all sites."
)

GLOSSARY = (
    (
        "epsilon",
        "How much an onlooker can learn at most about whether one given record was used. At 0 "
        "nothing; each 1 more multiplies the odds of a right guess by up to 2.7.",
    ),
    ("delta", "The small chance with which the bound on epsilon may fail."),
    (
        "cap",
        "The epsilon that the officer allows. The site's own program stops before it is passed.",
    ),
    (
        "ledger, or books",
        "The site's signed list of everything ever released about its records and what it cost. "
        "Entries can be added, not changed.",
    ),
    (
        "paid for, or charged",
        "Written into the books, for good, before a record is read; nothing is ever given back, "
        "also where nothing came of it.",
    ),
    (
        "update",
        "The numbers a site sends after a round of training: its change to the model, with noise.",
    ),
    (
        "noise",
        "Random numbers added to each step so that no single record can be read from the result. "
        "Its amount is a multiple of the most that one record can change.",
    ),
    ("rate", "The chance with which a step draws each record."),
    ("round, step", "A site answers once a round; each answer is made of one or more steps."),
    (
        "neighbours",
        "Two sets of records that differ in one record (or one person) only: what an onlooker must "
        "hardly be able to tell apart.",
    ),
    (
        "fixed in advance / filter",
        "How several runs are added up. Fixed in advance: all settings were committed before "
        "anything was seen. Filter: a more careful sum, for settings chosen later.",
    ),
    ("head", "The number and fingerprint of a ledger's last entry: it stands for all before it."),
    (
        "coordinator",
        "Whoever runs the training: sends out the model, collects the updates, averages them.",
    ),
    ("fingerprint", "The start of a public key or of an entry's digest: enough to compare by eye."),
    (
        "audit",
        "An attack on purpose. It can show that a claim is false, and never that one is true.",
    ),
    (
        "ceiling",
        "The highest epsilon that an audit could have found at all. A claim above it was not "
        "tested.",
    ),
    (
        "witness",
        "A program outside the coordinator and the sites that remembers how far each ledger had "
        "got.",
    ),
)
