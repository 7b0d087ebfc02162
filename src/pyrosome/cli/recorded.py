"""What builtin:nano answers to the prompts of self_test.py.  Written by `python -m pyrosome.cli.self_test`."""

from __future__ import annotations

from typing import Any

WEIGHTS = "365eb9834f6cdd46dec4668b579849d38babfed27adcaba2e7f2aa6e460bc3f1"
# fmt: off
CASES: list[dict[str, Any]] = [
{'prompt': '<｜User｜>spoke morning fell slept window wood rose empty stone quickly child forest behind '
           'evening water door garden long went ran came long kept past shadow waited path the light small '
           'field voice lost stone door quickly lobster 74 ; quickly house never evening kept waited letter '
           'spoke cold kept town voice young in kept of stood came behind beside soon walked cold button 87 '
           '; around shadow fell once lost curtain 53 ; quiet here sang friend past village cloud warm came '
           'lost green letter old of snake 20 ; market through walked friend there hill road later water '
           'held thimble 28 ; across compass 28 ; through light there hill light town always stood shadow '
           'slept light market path by in rat 13 ; snail 41 ; bright spoke village wood narrow rain at '
           'friend red through on night across alder 36 ; village rose bridge morning\n'
           '? alder<｜Assistant｜><think>',
 'ids': [0, 1242, 387, 81, 311, 759, 785, 789, 751, 770, 786, 825, 769, 799, 779, 754, 742, 760, 762, 750,
         752, 815, 783, 780, 782, 815, 796, 737, 768, 788, 771, 724, 767, 813, 747, 775, 795, 769, 750, 799,
         589, 927, 843, 799, 749, 802, 760, 796, 788, 777, 791, 816, 796, 748, 775, 812, 728, 796, 727, 784,
         782, 742, 743, 805, 781, 816, 698, 940, 843, 741, 768, 785, 807, 795, 702, 906, 843, 824, 809, 790,
         778, 737, 755, 766, 817, 782, 795, 820, 777, 811, 727, 579, 873, 843, 756, 739, 781, 778, 808, 746,
         745, 806, 762, 797, 696, 881, 843, 740, 707, 881, 843, 739, 767, 808, 746, 767, 748, 803, 784, 768,
         789, 767, 756, 771, 731, 728, 569, 866, 843, 591, 894, 843, 818, 791, 755, 770, 826, 764, 730, 778,
         822, 739, 729, 761, 740, 606, 889, 843, 755, 786, 753, 759, 201, 33, 606, 1243, 1260],
 'answer': [1121, 889, 1261, 979, 889, 1, 873, 881],
 'logprobs': [-0.002425, -0.126026, -7e-06, -0.00538, -0.032609, -0.331784, -0.095397, -0.497793]},
{'prompt': '<｜User｜>copy : panther plum amber anchor came 18 mouse<｜Assistant｜></think>',
 'ids': [0, 1242, 1043, 848, 564, 630, 722, 705, 782, 871, 568, 1243, 1261],
 'answer': [1047, 630, 722, 705, 782, 871, 568, 1],
 'logprobs': [-0.08179, -0.004893, -0.008235, -0.000572, -0.002579, -0.007694, -0.00676, -1e-06]},
{'prompt': '<｜User｜>1 + 66<｜Assistant｜><think>',
 'ids': [0, 1242, 19, 849, 919, 1243, 1260],
 'answer': [18, 849, 913, 851, 913, 843, 854, 849],
 'logprobs': [-9.4e-05, -8e-06, -3e-06, -1e-06, -3e-06, 0.0, -4.5e-05, -1e-06]},
]
