import time
from benchmarks import residence
if __name__ == "__main__":
    t=time.time()
    f = residence._paging(2, 3.0)
    for k,v in f.items(): print(k, {m:(round(x.median,1),round(x.lowest,1),round(x.highest,1)) for m,x in v.items()})
    print(time.time()-t)
