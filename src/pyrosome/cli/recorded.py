"""What builtin:nano answers to the prompts of self_test.py.  Written by `python -m pyrosome.cli.self_test`."""

from __future__ import annotations

from typing import Any

WEIGHTS = "8a1060673f92d16561d9aa7d520263e31b1c9970c0aa7aa56baa6a76c21a8a69"
# fmt: off
CASES: list[dict[str, Any]] = [
{'prompt': '<｜User｜>light went away sound path later stone market lost wood again once at red away river '
           'friend turned again away a friend through young long rain by slowly bright forest dark field ran '
           'voice with village across waited wind fire small again often away garden into met rain a door '
           'white from at badger 18 ; wood at door there hedgehog 27 ; salt 30 ; came small voice voice wall '
           'with red field often wood slowly met rose on often away shadow on green crane 45 ; village raven '
           '77 ; stone ran of shadow small wind cold bright turned marble 64 ; warm the house voice story '
           'winter house stood sound the evening field dark young sang story blue empty slowly snow large '
           'young summer market path turned turned came near dark went over old kept path across river ran '
           'turned beetle 58 ; winter snow\n'
           '? badger<｜Assistant｜><think>',
 'ids': [0, 1242, 316, 73, 74, 86, 783, 810, 774, 771, 806, 769, 756, 795, 770, 804, 807, 730, 822, 810, 744,
         778, 787, 804, 810, 725, 778, 739, 812, 815, 764, 731, 798, 818, 754, 819, 747, 780, 775, 732, 755,
         740, 788, 763, 773, 813, 804, 801, 810, 752, 738, 793, 764, 725, 750, 823, 733, 730, 534, 871, 843,
         770, 730, 750, 808, 572, 880, 843, 665, 883, 843, 782, 813, 775, 775, 772, 732, 822, 747, 801, 770,
         798, 793, 786, 729, 801, 810, 768, 729, 820, 541, 898, 843, 755, 536, 930, 843, 769, 780, 727, 768,
         813, 763, 816, 818, 787, 720, 917, 843, 817, 724, 749, 775, 776, 757, 749, 784, 774, 724, 760, 747,
         819, 812, 790, 776, 821, 825, 798, 765, 814, 812, 758, 756, 771, 787, 787, 782, 736, 819, 783, 734,
         811, 796, 771, 740, 744, 780, 787, 593, 911, 843, 757, 765, 201, 33, 534, 1243, 1260],
 'answer': [1049, 871, 1261, 961, 1, 911, 871, 911],
 'logprobs': [-0.003089, -0.000631, -0.0, -0.000695, 0.0, -0.348331, -0.486323, -0.01743]},
{'prompt': '<｜User｜>copy : sparrow with penguin 66 cactus fox 24 crab quickly<｜Assistant｜></think>',
 'ids': [0, 1242, 1043, 848, 537, 732, 545, 919, 623, 553, 877, 588, 799, 1243, 1261],
 'answer': [1052, 732, 545, 919, 623, 553, 877, 588],
 'logprobs': [-0.000326, -0.000162, -4.1e-05, -4.1e-05, -0.000195, -0.000202, -8.7e-05, -0.000273]},
{'prompt': '<｜User｜>11 + 10<｜Assistant｜><think>',
 'ids': [0, 1242, 954, 849, 863, 1243, 1260],
 'answer': [953, 849, 863, 851, 873, 843, 854, 849],
 'logprobs': [-9.6e-05, 0.0, -0.0, -1e-06, -4.8e-05, -0.0, -4e-06, -1e-06]},
]
