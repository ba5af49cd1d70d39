"""Short texts that have nothing to do with anybody's fine-tuning data: what an adapter must not forget.

Written for this purpose: everyday English, and some code, German, arithmetic and lists. Changing one changes
what earlier comparisons can be held against, so the set has a name with a version.
"""

PROBE_NAME = "built-in texts, version 1"

PROBE_TEXTS = (
    "The kitchen smelled of onions and warm butter when we came home. My aunt had started the soup early, and by the "
    "time the rain stopped it was thick enough to stand a spoon in. We ate it with bread from the day before.",
    "Most bicycles need very little care. Keep the chain clean and lightly oiled, check the air in the tyres once a "
    "week, and make sure that both brakes grip before you ride down a hill.",
    "Water boils at a lower temperature on a mountain than at the sea, because the air presses on it less. This is "
    "why beans take longer to cook in a village high up than in a town on the coast.",
    "The library opens at nine on weekdays and at ten on Saturdays. Books may be kept for three weeks. If nobody else "
    "is waiting for a book, you can keep it for another three.",
    "Her grandfather had been a fisherman, and he could tell from the colour of the evening sky whether it was worth "
    "getting up before dawn. He was wrong about as often as he was right, but nobody told him so.",
    "A cat sleeps for more than half of its life. It does not sleep deeply for most of that time: its ears keep "
    "turning, and it is on its feet as soon as something small moves in the grass.",
    "In the spring the river rises until it covers the lower meadows. The farmers move their cows to the hill in "
    "March and bring them back in the first dry week of May.",
    "If your train is late by more than an hour, you can ask for part of the fare back. Keep the ticket, fill in the "
    "form at the counter or on the website, and wait for two to four weeks.",
    "The second half was better than the first. The visitors scored early with a low shot from the edge of the box, "
    "but the home team answered within ten minutes and never looked like losing after that.",
    "Bread rises because yeast eats sugar and gives off gas. The gas is held by the dough, which stretches around it "
    "like many small balloons. Salt slows the yeast down and makes the dough firmer.",
    "The museum's oldest piece is a clay bowl with a pattern of waves around its rim. Nobody knows who made it. It "
    "was found in a field by a boy who was looking for his dog.",
    "Plants turn towards the light. Put a pot on a window sill and, after a few days, the leaves will face the glass; "
    "turn the pot around and they will slowly turn back again.",
    "He had promised to write every week, and for the first month he did. Then the letters became shorter, and by "
    "winter there was only a card with a picture of a bridge on it and two lines about the weather.",
    "To change a light bulb, switch the lamp off and let the old bulb cool down first. Turn it to the left until it "
    "comes out, put the new one in, and turn it to the right without using force.",
    "The moon goes around the earth in a little less than a month. We always see the same side of it, since it turns "
    "once about itself in the time that it needs for one round.",
    "The meeting was moved to Thursday because two people were ill. Please send your figures by Wednesday noon, so "
    "that they can be printed, and tell Maria whether you will stay for lunch.",
    "Salt was once so dear that soldiers were sent to guard the roads on which it was carried. Towns grew rich where "
    "it came out of the ground, and many of them still have it in their names.",
    "The flat has two rooms, a small kitchen and a balcony that gets the sun until three in the afternoon. The rent "
    "includes heating but not electricity. Pets are allowed if the neighbours do not mind.",
    "Good shoes matter more than a good jacket on a long walk. Buy them half a size too large, wear them at home for "
    "a week, and carry a second pair of socks even if you think that you will not need them.",
    "An old clock stood in the hall. It struck the hours a few minutes late, and everybody in the house had learned "
    "to take that into account, so that guests were always surprised to be told that they were early.",
    "Bees tell one another where flowers are by dancing. The direction of the dance shows where to fly, and its length "
    "shows how far. A bee that has followed it finds the place without having been there before.",
    "The price of coffee went up again last year after a dry summer in the regions where most of it is grown. Shops "
    "waited for some months before they passed the increase on to their customers.",
    "If you have a cold, rest, drink enough, and keep warm. See a doctor if the fever lasts for more than three days, "
    "if breathing hurts, or if you feel worse again after you had begun to feel better.",
    "The children built a dam of stones and mud across the stream. It held until lunch. Then the water found a gap "
    "near the roots of the willow, and in a minute the whole afternoon's work was gone.",
    "def mean(values):\n    if not values:\n        raise ValueError('no values')\n    total = 0.0\n    for value in "
    "values:\n        total += value\n    return total / len(values)\n",
    "for (let i = 0; i < names.length; i++) {\n  const name = names[i].trim();\n  if (name !== '') {\n    "
    "console.log(`${i + 1}. ${name}`);\n  }\n}\n",
    "Am Sonntag sind wir mit dem Zug an den See gefahren. Es war noch zu kalt zum Baden, aber in der Sonne konnte man "
    "gut sitzen. Auf dem Rückweg haben wir in einem kleinen Gasthaus zu Abend gegessen.",
    "Der Bäcker an der Ecke macht um sechs Uhr auf. Wer nach acht kommt, bekommt meistens keine Brezeln mehr. Im "
    "Sommer ist der Laden für zwei Wochen geschlossen.",
    "2 + 2 = 4\n7 + 5 = 12\n9 - 3 = 6\n6 * 7 = 42\n81 / 9 = 9\n15 + 27 = 42\n100 - 1 = 99\n12 * 12 = 144\n",
    "Shopping list:\n- two litres of milk\n- a loaf of bread\n- six eggs\n- tomatoes and a cucumber\n- washing powder\n"
    "- stamps\n",
)
