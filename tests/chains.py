"""Chains of reductions over a long rank M, as text: what `reduce_passes` has to stream (derivation.md section 7)."""

HEAD='''program form on cpu
rank P
rank M
rank E = 3
rank F = 2
'''
QKV='''in Q[P, E]: f32
in K[M, E]: f32
in V[M, F]: f32
out O[P, F]: f32
'''
S='S[p, m] = sum{e} Q[p, e] * K[m, e]\n'
def soft(y='W[p, m]', guard='', pre='', zero=False, extra=''):
    g = f' where {guard}' if guard else ''
    a = 'where(GM[p] > -inf, SN[p, m] / SD[p], 0.0)' if zero else 'SN[p, m] / SD[p]'
    return f'''{pre}GM[p] = max{{m}} {y}{g}
SN[p, m] = exp({y} - GM[p]){g}
SD[p] = sum{{m}} SN[p, m]{g}
A[p, m] = {a}{g}
O[p, f] = sum{{m}} A[p, m] * V[m, f]{g}
{extra}'''
FORMS={}
def form(name, text): FORMS[name]=text
base=HEAD+QKV+S
form('plain', base+soft('S[p, m]'))
form('scaled', base+soft(pre='W[p, m] = S[p, m] * 0.125\n'))
form('scaled_inline', base+soft('(S[p, m] * 0.125)'))
form('causal', base+soft(pre='W[p, m] = S[p, m] * 0.125\n', guard='m <= p'))
form('window', base+soft(pre='W[p, m] = S[p, m] * 0.125\n', guard='m <= p and p < m + 3'))
form('causal_bottom', base+soft('S[p, m]', guard='m <= p + M - P'))
form('causal_zero', base+soft('S[p, m]', guard='m <= p + M - P', zero=True))
form('mask', HEAD+'in MK[P, M]: bool\n'+QKV+S+soft('S[p, m]', guard='MK[p, m]'))
form('mask_zero', HEAD+'in MK[P, M]: bool\n'+QKV+S+soft('S[p, m]', guard='MK[p, m]', zero=True))
form('mask_inf', HEAD+'in MK[P, M]: bool\n'+QKV+S+soft('W[p, m]', pre='W[p, m] = where(MK[p, m], S[p, m] * 0.5, -inf)\n'))
form('mask_add', HEAD+'in MK[P, M]: bool\n'+QKV+S+soft('W[p, m]', pre='W[p, m] = S[p, m] * 0.5 + where(MK[p, m], 0.0, -inf)\n'))
form('mask_add_zero', HEAD+'in MK[P, M]: bool\n'+QKV+S+soft('W[p, m]', pre='W[p, m] = S[p, m] * 0.5 + where(MK[p, m], 0.0, -inf)\n', zero=True))
form('mask_float', HEAD+'in BI[P, M]: f32\n'+QKV+S+soft('W[p, m]', pre='W[p, m] = S[p, m] * 0.5 + BI[p, m]\n'))
form('bias_neutral', HEAD+'in BI[P]: f32\n'+QKV+S+soft('W[p, m]', pre='W[p, m] = S[p, m] * 0.5 + BI[p]\n'))
form('alibi', HEAD+'in SL[P]: f32\n'+QKV+S+soft('W[p, m]', pre='W[p, m] = S[p, m] * 0.5 + SL[p] * real(m - p)\n', guard='m <= p'))
form('softcap', base+soft(pre='W[p, m] = tanh(S[p, m] * 0.1) * 30.0\n', guard='m <= p'))
form('softcap_big', base+soft(pre='W[p, m] = tanh(S[p, m] * 0.1) * 300.0\n'))
form('lse', HEAD+'out LSE[P]: f32\n'+QKV+S+soft('S[p, m]', extra='LSE[p] = GM[p] + log(SD[p])\n', guard='m <= p'))
form('lse_inside', HEAD+'out LSE[P]: f32\n'+QKV+S+'''GM[p] = max{m} S[p, m]
SN[p, m] = exp(S[p, m] - GM[p])
SD[p] = sum{m} SN[p, m]
LSE[p] = GM[p] + log(SD[p])
A[p, m] = exp(S[p, m] - LSE[p])
O[p, f] = sum{m} A[p, m] * V[m, f]
''')
form('sink', HEAD+'in SK[P]: f32\n'+QKV+S+'''GM[p] = max{m} S[p, m] where m <= p
G2[p] = max(GM[p], SK[p])
SN[p, m] = exp(S[p, m] - G2[p]) where m <= p
SD[p] = sum{m} SN[p, m] where m <= p
D2[p] = SD[p] + exp(SK[p] - G2[p])
A[p, m] = SN[p, m] / D2[p] where m <= p
O[p, f] = sum{m} A[p, m] * V[m, f] where m <= p
''')
form('plus_one', base+'''GM[p] = max{m} S[p, m]
SN[p, m] = exp(S[p, m] - GM[p])
SD[p] = sum{m} SN[p, m]
D2[p] = SD[p] + exp(-GM[p])
A[p, m] = SN[p, m] / D2[p]
O[p, f] = sum{m} A[p, m] * V[m, f]
''')
form('no_max', base+'''SN[p, m] = exp(S[p, m]) where m <= p
SD[p] = sum{m} SN[p, m] where m <= p
A[p, m] = SN[p, m] / SD[p] where m <= p
O[p, f] = sum{m} A[p, m] * V[m, f] where m <= p
''')
form('two_values', HEAD+'in V2[M, F]: f32\nout O2[P, F]: f32\n'+QKV+S+soft('S[p, m]', extra='O2[p, f] = sum{m} A[p, m] * V2[m, f]\n'))
form('gate', HEAD+'in GT[P, F]: f32\nout OG[P, F]: f32\nin Q[P, E]: f32\nin K[M, E]: f32\nin V[M, F]: f32\n'+S+soft('S[p, m]', extra='OG[p, f] = O[p, f] * sigmoid(GT[p, f])\n'))
form('sigmoid', base+'''A[p, m] = sigmoid(S[p, m] - 2.0) where m <= p
O[p, f] = sum{m} A[p, m] * V[m, f] where m <= p
''')
form('relu2', base+'''SN[p, m] = square(relu(S[p, m]))
SD[p] = sum{m} SN[p, m]
A[p, m] = SN[p, m] / (SD[p] + 0.001)
O[p, f] = sum{m} A[p, m] * V[m, f]
''')
form('exp2', base+'''W[p, m] = S[p, m] * 0.7
GM[p] = max{m} W[p, m]
SN[p, m] = exp2(W[p, m] - GM[p])
SD[p] = sum{m} SN[p, m]
A[p, m] = SN[p, m] / SD[p]
O[p, f] = sum{m} A[p, m] * V[m, f]
''')
form('safe_ref', base+'''GM[p] = max{m} S[p, m] where m <= p
GS[p] = where(GM[p] == -inf, 0.0, GM[p])
SN[p, m] = exp(S[p, m] - GS[p]) where m <= p
SD[p] = sum{m} SN[p, m] where m <= p
A[p, m] = where(SD[p] > 0.0, SN[p, m] / SD[p], 0.0) where m <= p
O[p, f] = sum{m} A[p, m] * V[m, f] where m <= p
''')
form('raw_scale', base+'''GM[p] = max{m} S[p, m]
SN[p, m] = exp((S[p, m] - GM[p]) * 0.25)
SD[p] = sum{m} SN[p, m]
A[p, m] = SN[p, m] / SD[p]
O[p, f] = sum{m} A[p, m] * V[m, f]
''')
form('scale_tensor', HEAD+'in C[P]: f32\n'+QKV+S+soft(pre='W[p, m] = S[p, m] * C[p]\n'))
form('differential', HEAD+'in Q2[P, E]: f32\nin K2[M, E]: f32\n'+QKV+S+'''T[p, m] = sum{e} Q2[p, e] * K2[m, e]
GM[p] = max{m} S[p, m]
SN[p, m] = exp(S[p, m] - GM[p])
SD[p] = sum{m} SN[p, m]
HM[p] = max{m} T[p, m]
TN[p, m] = exp(T[p, m] - HM[p])
TD[p] = sum{m} TN[p, m]
A[p, m] = SN[p, m] / SD[p] - TN[p, m] / TD[p] * 0.3
O[p, f] = sum{m} A[p, m] * V[m, f]
''')
form('entropy', HEAD+'in X[P, M]: f32\nout H[P]: f32\n'+'''GM[p] = max{m} X[p, m]
SN[p, m] = exp(X[p, m] - GM[p])
SD[p] = sum{m} SN[p, m]
A[p, m] = SN[p, m] / SD[p]
H[p] = sum{m} -A[p, m] * log(A[p, m])
''')
form('entropy2', HEAD+'in X[P, M]: f32\nout H[P]: f32\n'+'''GM[p] = max{m} X[p, m]
SN[p, m] = exp(X[p, m] - GM[p])
SD[p] = sum{m} SN[p, m]
A[p, m] = SN[p, m] / SD[p]
L[p, m] = X[p, m] - GM[p] - log(SD[p])
H[p] = sum{m} -A[p, m] * L[p, m]
''')
form('variance', HEAD+'in X[P, M]: f32\nout VAR[P]: f32\n'+'''T[p] = sum{m} X[p, m]
MU[p] = T[p] / real(M)
VAR[p] = sum{m} square(X[p, m] - MU[p]) / real(M)
''')
form('rmsnorm_matmul', HEAD+'in X[P, M]: f32\nin G[M]: f32\nin WT[M, F]: f32\nout Y[P, F]: f32\n'+'''SQ[p] = sum{m} square(X[p, m])
R[p] = rsqrt(SQ[p] / real(M) + 0.00001)
N[p, m] = X[p, m] * R[p] * G[m]
Y[p, f] = sum{m} N[p, m] * WT[m, f]
''')
form('layernorm_matmul', HEAD+'in X[P, M]: f32\nin G[M]: f32\nin BT[M]: f32\nin WT[M, F]: f32\nout Y[P, F]: f32\n'+'''T[p] = sum{m} X[p, m]
MU[p] = T[p] / real(M)
D[p, m] = X[p, m] - MU[p]
VAR[p] = sum{m} square(D[p, m])
R[p] = rsqrt(VAR[p] / real(M) + 0.00001)
N[p, m] = D[p, m] * R[p] * G[m] + BT[m]
Y[p, f] = sum{m} N[p, m] * WT[m, f]
''')
form('cross_entropy', HEAD+'in X[P, E]: f32\nin WV[M, E]: f32\nin LB[P]: i64\nout LOSS[P]: f32\n'+'''Z[p, m] = sum{e} X[p, e] * WV[m, e]
GM[p] = max{m} Z[p, m]
SN[p, m] = exp(Z[p, m] - GM[p])
SD[p] = sum{m} SN[p, m]
LS[p, m] = Z[p, m] - GM[p] - log(SD[p])
LOSS[p] = sum{m} where(m == LB[p], -LS[p, m], 0.0)
''')
form('v_squared', HEAD+'out O2[P, F]: f32\n'+QKV+S+soft('S[p, m]', extra='O2[p, f] = sum{m} A[p, m] * square(V[m, f])\n'))
form('sum_p2', HEAD+'in X[P, M]: f32\nout H[P]: f32\n'+'''GM[p] = max{m} X[p, m]
SN[p, m] = exp(X[p, m] - GM[p])
SD[p] = sum{m} SN[p, m]
A[p, m] = SN[p, m] / SD[p]
H[p] = sum{m} square(A[p, m])
''')
form('kl', HEAD+'in X[P, M]: f32\nin Y[P, M]: f32\nout H[P]: f32\n'+'''GM[p] = max{m} X[p, m]
SN[p, m] = exp(X[p, m] - GM[p])
SD[p] = sum{m} SN[p, m]
A[p, m] = SN[p, m] / SD[p]
HM[p] = max{m} Y[p, m]
TN[p, m] = exp(Y[p, m] - HM[p])
TD[p] = sum{m} TN[p, m]
B[p, m] = TN[p, m] / TD[p]
H[p] = sum{m} A[p, m] * (log(A[p, m]) - log(B[p, m]))
''')
form('max_prob', HEAD+'in X[P, M]: f32\nout H[P]: f32\n'+'''GM[p] = max{m} X[p, m]
SN[p, m] = exp(X[p, m] - GM[p])
SD[p] = sum{m} SN[p, m]
A[p, m] = SN[p, m] / SD[p]
H[p] = max{m} A[p, m]
''')
form('absmax', HEAD+'in X[P, M]: f32\nin WT[M, F]: f32\nout Y[P, F]: f32\n'+'''AM[p] = max{m} abs(X[p, m])
Z[p, m] = round(X[p, m] * 127.0 / AM[p])
Y[p, f] = sum{m} Z[p, m] * WT[m, f]
''')
form('zscore', base+'''T[p] = sum{m} S[p, m]
MU[p] = T[p] / real(M)
VAR[p] = sum{m} square(S[p, m] - MU[p])
R[p] = rsqrt(VAR[p] / real(M) + 0.00001)
'''+soft('((S[p, m] - MU[p]) * R[p])'))
form('var_under', base+soft('S[p, m]').replace('O[p, f] =','MU[p, f] =')+'''O[p, f] = sum{m} A[p, m] * square(V[m, f] - MU[p, f])
''')
form('written', HEAD+'in X[P, M]: f32\nout A[P, M]: f32\n'+'''GM[p] = max{m} X[p, m]
SN[p, m] = exp(X[p, m] - GM[p])
SD[p] = sum{m} SN[p, m]
A[p, m] = SN[p, m] / SD[p]
''')
