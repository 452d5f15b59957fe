#!lua name=inferpipe_gates_v1
-- Gates: what an execution passes before it starts. Keys stand at the top of redis_functions.lua.
--
-- A gate lives in the slot its name hashes to, mostly another one than the execution's, so it is
-- reached and answers by messages (outbox, relay) and every function here may see one twice.
--   enter: the execution wants through. It passes, or waits in line, or is refused (line full).
--   leave: the execution has ended, wherever it stood; its place goes to the next in line.
-- A slot gate holds at most `limit` executions at once. A cache gate lets one execution through and
-- keeps the others in line until that one leaves with a result, which then is theirs too.
-- What passes one gate is sent on to the next of its route, and from the last one to its execution.
-- Nothing is leased: an accepted execution reaches a terminal state, and the commit that ends it
-- holds its `leave`.

local SEEN_TTL_MS = 86400000

local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

local function text(n)
  return string.format('%.0f', n)
end

local function post(p, id, target, log, body)
  redis.call('XADD', p .. ':outbox', '*', 'm', id, 't', target .. ':' .. log, 'b', body)
end

-- tell the execution: verdict is passed | hit | refused
local function tell(p, message, verdict, value)
  local answer = {execution = message.execution, verdict = verdict, value = value, at_ms = now_ms()}
  post(p, message.execution .. '/gate/' .. verdict, message.home, 'gate.verdict', cjson.encode(answer))
end

local function pass(p, message)
  table.remove(message.route, 1)
  local onward = message.route[1]
  if onward then
    post(p, message.execution .. '/enter/' .. onward.name, onward.partition, 'gate', cjson.encode(message))
  else
    tell(p, message, 'passed')
  end
end

local function enter(p, message, now)
  local gate, execution = message.route[1], message.execution
  local key = p .. ':gate:' .. gate.name
  -- Messages of two outboxes overtake each other: a cancelled execution may leave before it comes.
  if redis.call('ZSCORE', p .. ':seen', 'left/' .. gate.name .. '/' .. execution) then return end
  if gate.ttl_ms then
    local value = redis.call('GET', key .. ':value')
    if value then return tell(p, message, 'hit', value) end
  end
  if redis.call('ZCARD', key) < gate.limit then
    redis.call('ZADD', key, text(now), execution)
    return pass(p, message)
  end
  if gate.waiting_max <= redis.call('ZCARD', key .. ':line') then return tell(p, message, 'refused') end
  redis.call('ZADD', key .. ':line', text(now - message.priority * 1e13), execution)
  redis.call('HSET', key .. ':messages', execution, cjson.encode(message))
end

local function leave(p, message, now)
  local gate, execution = message.gate, message.execution
  local key = p .. ':gate:' .. gate.name
  redis.call('ZADD', p .. ':seen', text(now), 'left/' .. gate.name .. '/' .. execution)
  if redis.call('ZREM', key .. ':line', execution) == 1 then
    redis.call('HDEL', key .. ':messages', execution)
  end
  if redis.call('ZREM', key, execution) == 0 then return end
  if gate.ttl_ms and message.value then
    redis.call('SET', key .. ':value', message.value, 'PX', gate.ttl_ms)
    for _, waiting in ipairs(redis.call('HVALS', key .. ':messages')) do
      tell(p, cjson.decode(waiting), 'hit', message.value)
    end
    redis.call('DEL', key .. ':line', key .. ':messages')
    return
  end
  while redis.call('ZCARD', key) < gate.limit do
    local first = redis.call('ZPOPMIN', key .. ':line')[1]
    if not first then return end
    local waiting = redis.call('HGET', key .. ':messages', first)
    redis.call('HDEL', key .. ':messages', first)
    redis.call('ZADD', key, text(now), first)
    pass(p, cjson.decode(waiting))
  end
end

-- A rate is when it will be without debt: GCRA (ITU-T I.371, Annex A), a bucket that refills evenly
-- over the window. What is charged moves that moment on, what is given back moves it towards now.
local function charge(p, name, cost_ms, now)
  local key = p .. ':rate:' .. name
  local due = math.max(tonumber(redis.call('GET', key) or '0'), now) + cost_ms
  if due > now then
    redis.call('SET', key, string.format('%.3f', due), 'PX', text(math.ceil(due - now)))
  else
    redis.call('DEL', key)
  end
end

-- gate: message_id log body -> 1 when it is new here
local function gate(keys, args)
  local p, now = keys[1], now_ms()
  if redis.call('ZSCORE', p .. ':seen', args[1]) then return 0 end
  local message = cjson.decode(args[3])
  if message.rate then
    charge(p, message.rate, message.used * message.window_ms / message.tokens, now)
  elseif message.gate then
    leave(p, message, now)
  else
    enter(p, message, now)
  end
  -- Noted last: a message that fails half-way is tried again.
  redis.call('ZADD', p .. ':seen', text(now), args[1])
  redis.call('ZREMRANGEBYSCORE', p .. ':seen', '-inf', text(now - SEEN_TTL_MS))
  return 1
end

-- gate_look: name -> {inside, in line, 1 when it keeps a value}
local function gate_look(keys, args)
  local key = keys[1] .. ':gate:' .. args[1]
  return {redis.call('ZCARD', key), redis.call('ZCARD', key .. ':line'), redis.call('EXISTS', key .. ':value')}
end

-- rate_take: name count_max window_ms ahead_max_ms [count] -> ms to wait before the start, or minus
-- the ms until they would be given. A negative count is given back.
local function rate_take(keys, args)
  local p, name, now = keys[1], args[1], now_ms()
  local window, ahead, count = tonumber(args[3]), tonumber(args[4]), tonumber(args[5] or '1')
  local cost = window / tonumber(args[2]) * count
  local due = math.max(tonumber(redis.call('GET', p .. ':rate:' .. name) or '0'), now)
  -- As much as the bucket holds must be there: a thousandth is the rounding of what is stored.
  local wait = math.max(0, math.ceil(due + cost - window - now - 0.001))
  if count > 0 and wait > ahead then return -(wait - ahead) end
  charge(p, name, cost, now)
  return wait
end

redis.register_function('ip1_gate', gate)
redis.register_function('ip1_gate_look', gate_look)
redis.register_function('ip1_rate_take', rate_take)
