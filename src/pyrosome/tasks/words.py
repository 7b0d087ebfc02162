"""The words of the synthetic tasks.  With its leading space each is one token of the tokenizers trained here."""

from __future__ import annotations

# What a ledger has entries for: 192 common nouns.
_NAMES = """
    falcon otter badger heron raven sparrow eagle owl robin crane stork pigeon parrot penguin turkey goose
    swan duck hawk finch wolf fox bear moose bison camel donkey horse pony zebra tiger lion
    panther leopard rabbit hare mouse rat squirrel beaver hedgehog mole ferret lizard turtle frog toad snake
    cobra salmon trout shark whale dolphin seal walrus crab lobster oyster snail spider beetle moth hornet
    oak elm birch maple cedar willow poplar spruce fir larch alder hazel walnut chestnut ivy fern
    moss clover tulip lily orchid daisy poppy thistle nettle reed bamboo cactus palm olive fig date
    apple pear plum cherry peach lemon orange melon grape mango banana berry carrot onion garlic leek
    turnip pepper tomato potato cabbage lettuce spinach celery bean lentil barley wheat oat rye rice corn
    bread butter cheese honey sugar salt vinegar mustard ginger cinnamon hammer chisel anvil saw pliers wrench
    shovel rake hoe axe ladder bucket barrel basket kettle skillet spoon fork plate bowl cup bottle
    candle lantern mirror needle thimble ribbon button blanket pillow carpet curtain saddle bridle anchor rudder compass
    violin flute trumpet drum harp piano guitar bell copper silver iron tin marble granite amber pearl
"""

# What stands between the entries and means nothing.
_FILLER = """
    the a and of in on at by with from over under near past into through across around behind beside
    river road hill field town house door window garden bridge forest village market winter summer morning evening night
    water wind rain snow cloud light shadow stone wood path wall fire sound voice story letter friend child
    ran walked came went stood fell rose turned waited slept sang spoke heard met found lost kept held
    slowly quickly quietly often never always again soon later once there here away
    old young small large long cold warm bright dark green blue red white quiet empty narrow
"""

NAMES: tuple[str, ...] = tuple(_NAMES.split())
FILLER: tuple[str, ...] = tuple(_FILLER.split())

# The values of entries, two digits each.
VALUES: tuple[str, ...] = tuple(str(v) for v in range(10, 100))

# Of questions, instructions and answers that are neither of the above.
ORDINALS: tuple[str, ...] = ("first", "second", "third", "fourth")
COMMANDS: tuple[str, ...] = ("all", "quote", "copy", "look", "up", "say", "twice", "count", "to", "is", "i", "you")
