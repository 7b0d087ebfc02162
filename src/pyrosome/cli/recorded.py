"""What builtin:nano answers to the prompts of self_test.py.  Written by `python -m pyrosome.cli.self_test`."""

from __future__ import annotations

from typing import Any

WEIGHTS = "5082ff23c2042c1c6c800fd37df95a6fee61421cd6891ea0329567fb82ba3740"
# fmt: off
CASES: list[dict[str, Any]] = [
{'prompt': '<｜User｜>rose went across shadow rain slowly narrow blue ran stone window of and path market wind '
           'long friend walked town and winter into story narrow met behind cold later quickly warm never '
           'soon evening empty white across often held path friend sound dark voice here evening large cold '
           'path came bright slowly sound hill winter moose 63 ; kept around warm window warm village red '
           'kept voice fox 33 ; letter spoke stood market road story green waited by there slowly warm '
           'beside quietly at spoke garden field large over letter old house road large light held of night '
           'around met with red and quickly and door once across behind lost wind in empty through of '
           'morning turned quietly under summer of wood never quietly cold often young kept wall field heard '
           'market over wood large past stood rain letter into red door rose light a walked into\n'
           '? moose<｜Assistant｜><think>',
 'ids': [0, 1242, 332, 263, 783, 740, 768, 764, 798, 826, 821, 780, 769, 751, 727, 726, 771, 756, 763, 815,
         778, 781, 748, 726, 757, 738, 776, 826, 793, 742, 816, 806, 799, 817, 802, 805, 760, 825, 823, 740,
         801, 797, 771, 778, 774, 819, 775, 809, 760, 814, 816, 771, 782, 818, 798, 774, 746, 757, 555, 916,
         843, 796, 741, 817, 751, 817, 755, 822, 796, 775, 553, 886, 843, 777, 791, 784, 756, 745, 776, 820,
         788, 731, 808, 798, 817, 743, 800, 730, 791, 752, 747, 814, 734, 777, 811, 749, 745, 814, 767, 797,
         727, 761, 741, 793, 732, 822, 726, 799, 726, 750, 807, 740, 742, 795, 763, 728, 825, 739, 727, 759,
         787, 800, 735, 758, 727, 770, 802, 800, 816, 801, 812, 796, 772, 747, 792, 756, 734, 770, 814, 737,
         784, 764, 777, 738, 822, 750, 786, 767, 725, 781, 738, 201, 33, 555, 1243, 1260],
 'answer': [1070, 916, 1261, 1006, 1, 916, 1, 916],
 'logprobs': [-0.000235, -0.001893, -0.0, -0.002175, 0.0, -0.363309, -0.187834, -0.328165]},
{'prompt': '<｜User｜>copy : 50 barrel garden 60 fork iron quiet often with guitar<｜Assistant｜></think>',
 'ids': [0, 1242, 1043, 848, 903, 682, 752, 913, 687, 718, 824, 801, 732, 714, 1243, 1261],
 'answer': [993, 682, 752, 913, 687, 718, 824, 801],
 'logprobs': [-0.000236, -0.000142, -0.000172, -3.1e-05, -6.4e-05, -0.000192, -0.000154, -0.000272]},
{'prompt': '<｜User｜>21 + 10<｜Assistant｜><think>',
 'ids': [0, 1242, 964, 849, 863, 1243, 1260],
 'answer': [963, 849, 863, 851, 883, 843, 854, 849],
 'logprobs': [-1.4e-05, -1e-06, -0.0, -1.8e-05, -5.3e-05, -0.0, -4e-06, -1e-06]},
]
