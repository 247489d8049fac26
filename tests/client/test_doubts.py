"""A node in doubt is away three times, and not more often, however often it doubts."""

from client.doubts import ABSENCES_S, Doubts


def absences(looks, settled_at=None):
    """When a node that finds nothing at these times was away, and when it no longer doubted."""
    now, away, sure = [0.0], [], []
    doubts = Doubts(lambda: now[0])
    for at in looks:
        now[0] = at
        if at == settled_at:
            doubts.settled()
        if not doubts.remain(lambda at=at: away.append(at)):
            sure.append(at)
    return away, sure


def test_it_is_away_at_once_and_twice_more():
    assert absences(range(100, 176)) == ([100, 115, 175], [175])
    assert ABSENCES_S == (0.0, 15.0, 75.0)


def test_who_looks_seldom_is_away_at_its_looks():
    assert absences([0, 40, 41, 80]) == ([0, 40, 80], [80])


def test_a_new_doubt_begins_anew():
    assert absences([0, 5, 10, 11], settled_at=10)[0] == [0, 10]


def test_an_absence_that_did_not_come_to_be_is_made_up_for():
    doubts, away = Doubts(lambda: 0.0), []

    def cut():
        raise OSError("cut")

    try:
        doubts.remain(cut)
    except OSError:
        away.append("failed")
    assert doubts.remain(lambda: away.append("away"))
    assert away == ["failed", "away"]
