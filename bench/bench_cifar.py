"""CIFAR-10, time to accuracy: a small ResNet trained dense, and at 90 % sparsity with RigL on the compiled kernels, each from scratch.

    python bench/bench_cifar.py --path FOLDER [--epochs 10] [--as_long] [--out bench/results]

FOLDER holds sheets of 100×100 lossless images, `train_0.webp` … `train_4.webp` and `test.webp`, and `labels.npz` with `y_train` and `y_test`.
Both runs have the same seed, batches, augmentation and one-cycle schedule; with `--as_long` a third one trains sparse for as many epochs
as fit into the time of the dense run. Time is wall-clock time of training (the connectivity updates,
measuring and swapping of layers included; validation is not).
"""
import argparse, json, platform, time
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, accuracy, set_seed
import fastai.callback.schedule
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock
import fastsparse
from fastsparse import DynamicSparseTrainingCallback, RigL_presets, sparse_kernels_report, sparse_params, sparsify_model

Image.MAX_IMAGE_PIXELS = None

def images(file):
    "(10000,3,32,32) float, normalised."
    x = np.asarray(Image.open(file).convert('RGB')).reshape(100,32,100,32,3).swapaxes(1,2).reshape(-1,32,32,3)
    mean,std = torch.tensor([0.4914,0.4822,0.4465]),torch.tensor([0.2470,0.2435,0.2616])
    return ((torch.from_numpy(x).float()/255 - mean)/std).permute(0,3,1,2).contiguous()

class Batches:
    "Shuffled batches; in training flipped image by image, and shifted by up to 4 pixels batch by batch."
    def __init__(self, x, y, bs, train): self.x,self.y,self.bs,self.train = x,y,bs,train
    def __len__(self): return len(self.x)//self.bs
    def __iter__(self):
        order = torch.randperm(len(self.x)) if self.train else torch.arange(len(self.x))
        for i in order[:len(self)*self.bs].view(-1, self.bs):
            x = self.x[i]
            if self.train:
                flip = torch.rand(self.bs) < 0.5
                x[flip] = x[flip].flip(-1)
                dy,dx = torch.randint(0, 9, (2,)).tolist()
                x = F.pad(x, (4,4,4,4))[:,:,dy:dy+32,dx:dx+32].contiguous()
            yield x,self.y[i]

def resnet(widths=(64,128,256), n_out=10):
    "A stem of stride 2 and one basic block a stage."
    def stage(i, o, s):
        down = nn.Sequential(nn.Conv2d(i, o, 1, s, bias=False), nn.BatchNorm2d(o)) if (i,s) != (o,1) else None
        return BasicBlock(i, o, s, down)
    ins = (widths[0], *widths[:-1])
    return nn.Sequential(nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True),
                         *[stage(i, o, 1 if n == 0 else 2) for n,(i,o) in enumerate(zip(ins, widths))],
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], n_out))

class Clock(Callback):
    "Seconds of training so far, at each epoch's end."
    order = 1000
    def before_fit(self): self.total,self.at = 0.,[]
    def before_train(self): self.start = time.perf_counter()
    def after_train(self):
        self.total += time.perf_counter()-self.start
        self.at.append(self.total)

class ChannelsLast(Callback):
    def before_batch(self): self.learn.xb = tuple(x.to(memory_format=torch.channels_last) for x in self.xb)

def train(data, method, a, epochs):
    set_seed(a.seed, reproducible=True)
    (xt,yt),(xv,yv) = data
    model,clock = resnet(),Clock()
    learn = Learner(DataLoaders(Batches(xt, yt, a.bs, True), Batches(xv, yv, 1000, False)), model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=clock)
    cbs = []
    if method == 'rigl':
        sparsify_model(learn, a.sparsity, skip=['0', '8'])
        cbs = [DynamicSparseTrainingCallback(**RigL_presets)]
    if method == 'dense channels_last':
        model.to(memory_format=torch.channels_last)
        cbs = [ChannelsLast()]
    learn.fit_one_cycle(epochs, a.lr, cbs=cbs)
    return dict(method=method, epochs=epochs, seconds=clock.at, accuracy=[float(v[2]) for v in learn.recorder.values],
                active=sum(p.n_active for p in sparse_params(model)), weights=sum(p.mask.numel() for p in sparse_params(model)),
                layers=sparse_kernels_report(learn).reset_index().to_dict('records') if method == 'rigl' else [])

def time_to(run, level):
    "Seconds until an accuracy is reached, interpolated within the epoch; None if never."
    last_t,last_a = 0.,0.1
    for t,a in zip(run['seconds'], run['accuracy']):
        if a >= level: return last_t + (t-last_t)*(level-last_a)/max(a-last_a, 1e-9)
        last_t,last_a = t,a

def plot(runs, path):
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig,ax = plt.subplots(figsize=(7,4.2), layout='constrained')
    for r in runs: ax.plot([t/60 for t in r['seconds']], [100*a for a in r['accuracy']], 'o-', label=r['label'])
    ax.set(xlabel='minutes of training', ylabel='test accuracy (%)')
    ax.grid(alpha=.3)
    ax.legend()
    fig.savefig(path, dpi=110)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--path', required=True); p.add_argument('--epochs', type=int, default=10); p.add_argument('--bs', type=int, default=128)
    p.add_argument('--lr', type=float, default=4e-3); p.add_argument('--sparsity', type=float, default=.9); p.add_argument('--seed', type=int, default=0)
    p.add_argument('--threads', type=int, default=2); p.add_argument('--n_train', type=int); p.add_argument('--out', default='bench/results')
    p.add_argument('--as_long', action='store_true'); p.add_argument('--methods', nargs='+', default=['dense','rigl'], choices=['dense','dense channels_last','rigl'])
    a = p.parse_args()
    if a.as_long and not {'dense','rigl'} <= {*a.methods}: p.error('--as_long needs the methods dense and rigl')
    torch.set_num_threads(a.threads)
    folder,out = Path(a.path),Path(a.out)
    labels = np.load(folder/'labels.npz')
    ys = [torch.from_numpy(labels[k].astype(np.int64)) for k in ('y_train','y_test')]
    x = torch.cat([images(folder/f'train_{i}.webp') for i in range(5)])
    data = (x[:a.n_train], ys[0][:a.n_train]),(images(folder/'test.webp'), ys[1])
    runs = []
    for m in a.methods:
        runs.append(train(data, m, a, a.epochs))
        runs[-1]['label'] = m if m != 'rigl' else f'RigL, {a.sparsity:.0%} sparse'
    if a.as_long:
        total = {r['method']: r['seconds'][-1] for r in runs}
        n = int(a.epochs*total['dense']/total['rigl'])
        runs.append(train(data, 'rigl', a, n))
        runs[-1]['label'] = f'RigL, {a.sparsity:.0%} sparse, {n} epochs'
    final = max(a for r in runs for a in r['accuracy'])
    levels = [l/100 for l in range(50, 100, 5) if l/100 <= final]
    for r in runs: r['time_to'] = {f'{l:g}': time_to(r, l) for l in levels}
    out.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k,v in vars(a).items() if k not in ('path','out')}
    res = dict(bench='cifar', settings=settings, machine=platform.machine(), runs=runs,
               versions=dict(fastsparse=fastsparse.__version__, torch=torch.__version__, python=platform.python_version()))
    (out/'cifar.json').write_text(json.dumps(res, indent=1) + '\n')
    plot(runs, out/'cifar.png')
    for r in runs: print(f"{r['label']:22} {r['accuracy'][-1]:.2%} after {r['seconds'][-1]:.0f} s; " + ', '.join(f'{float(l):.0%} in {t:.0f} s' for l,t in r['time_to'].items() if t is not None))

if __name__ == '__main__': main()
